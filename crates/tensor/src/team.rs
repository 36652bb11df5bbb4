//! A spinning fork-join team: no parking between small parallel loops.
//!
//! Handing a loop to a thread pool costs several microseconds, since its threads sleep in between. Decoding one token
//! runs more than a hundred loops of ten or twenty microseconds each. Inside [`scope`] the other threads of the pool
//! wait in a spin loop instead, and take part in a loop a few hundred nanoseconds after it begins.
//!
//! Nothing depends on them: parts of a loop are claimed one by one, so a thread that is late, or busy with something
//! else, only means that the others do more parts.
//!
//! Between two loops the memory would stand idle, and memory is what decoding waits for. [`read_ahead`] names what the
//! next loop will read; waiting threads fetch it into their caches meanwhile. They then take parts from the front,
//! where that begins, and the leader from the back.

use rayon::prelude::*;
use std::cell::Cell;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize};

/// One loop: its body, and how many parts it has.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    parts: usize,
}

/// A counter in cache lines of its own: threads that spin on one must not slow down those that count with another.
#[derive(Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

/// A stretch of memory that waiting threads fetch, each line once.
#[derive(Default)]
#[repr(align(128))]
struct Ahead {
    start: AtomicPtr<u8>,
    len: AtomicUsize,
    done: AtomicUsize,
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// Bytes that a waiting thread fetches before it looks again whether it is needed.
const FETCH: usize = 4 * LINE;

/// Bytes fetched ahead at most: what certainly fits beside other things into a core's second cache.
const MOST_AHEAD: usize = 384 << 10;

impl Ahead {
    /// Asks for the next few lines, without waiting for them.
    fn fetch(&self) {
        let len = self.len.load(Relaxed);
        if self.done.load(Relaxed) >= len {
            return;
        }
        let start = self.done.fetch_add(FETCH, Relaxed);
        for offset in (start..len.min(start + FETCH)).step_by(LINE) {
            prefetch(self.start.load(Relaxed).wrapping_add(offset));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn prefetch(line: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint, for whatever address: it reads nothing and cannot fail.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
}

/// Stable Rust has no hint for other CPUs.
#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_line: *const u8) {}

/// Names `bytes` as what the loop after the one that this thread runs next will read first. Threads that wait for it
/// fetch them.
pub(crate) fn read_ahead(bytes: &[u8]) {
    if let Role::Leader(team) = ROLE.get() {
        #[allow(unsafe_code)]
        // SAFETY: it was this thread's role, which `scope` takes back before the team goes.
        let Ahead { start, len, done } = unsafe { &(*team).ahead };
        len.store(0, Relaxed);
        start.store(bytes.as_ptr().cast_mut(), Relaxed);
        done.store(0, Relaxed);
        len.store(bytes.len().min(MOST_AHEAD), Relaxed);
    }
}

/// What the thread that runs the chain shares with its helpers.
struct Team {
    /// Odd while a job is open to helpers. Only the leader changes it.
    epoch: Counter,
    /// Helpers that are, or are about to be, inside the open job.
    inside: Counter,
    /// Parts that have been claimed.
    claimed: Counter,
    /// Of those, the ones that helpers claimed, which are the first ones.
    front: Counter,
    /// What the next loop will read. The three may be of different ranges for a moment: fetching what nobody reads, or
    /// what is not there any more, does no harm.
    ahead: Ahead,
    /// Set when the chain is at its end.
    ended: AtomicBool,
    /// Set when a helper's part panicked.
    failed: AtomicBool,
    /// Written by the leader while `epoch` is even, read by helpers while it is odd.
    job: Cell<Option<Job>>,
}

// SAFETY: all fields but `job` are atomics. `job` is written only by the leader, while `epoch` is even and no helper is
// inside; helpers read it only after they have counted themselves in and then seen `epoch` odd, which the leader's
// later write waits for (`Team::run`). The body it points to is `Sync`.
#[allow(unsafe_code)]
unsafe impl Sync for Team {}

/// What a thread has to do with teams.
#[derive(Clone, Copy)]
enum Role {
    /// Nothing.
    None,
    /// It runs this team's chain.
    Leader(*const Team),
    /// It is inside a part of a loop of some team. Waiting for other threads there could mean waiting for itself.
    InLoop,
}

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::None) };
}

/// Takes on a role until it is dropped.
struct Acting(Role);

impl Acting {
    fn new(role: Role) -> Self {
        Self(ROLE.replace(role))
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        ROLE.set(self.0);
    }
}

/// Iterations of the spin loop before the thread offers its core to others.
const SPINS: u32 = 20_000;

/// Waits until `ready` says so, and does `meanwhile` in between.
fn wait(ready: impl Fn() -> bool, meanwhile: impl Fn()) {
    let mut spins = 0;
    while !ready() {
        meanwhile();
        if spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// Runs `chain` on a thread of the current rayon pool while the pool's other threads spin for its loops.
///
/// Rayon's own parallel iterators inside `chain` get no help from those threads.
///
/// # Panics
/// When `chain` panics.
pub fn scope<R: Send>(chain: impl FnOnce() -> R + Send) -> R {
    if rayon::current_num_threads() == 1 || !matches!(ROLE.get(), Role::None) {
        return chain();
    }
    let team = Team {
        epoch: Counter::default(),
        inside: Counter::default(),
        claimed: Counter::default(),
        front: Counter::default(),
        ahead: Ahead::default(),
        ended: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        job: Cell::new(None),
    };
    // Whoever comes first leads.
    let chain = Mutex::new(Some(chain));
    let results = rayon::broadcast(|_| {
        let chain = chain.lock().ok().and_then(|mut chain| chain.take());
        match chain {
            Some(chain) => {
                let _end = End(&team);
                let _leader = Acting::new(Role::Leader(&team));
                Some(chain())
            }
            None => {
                team.help();
                None
            }
        }
    });
    match results.into_iter().flatten().next() {
        Some(result) => result,
        None => panic!("the leader of a team did not finish"),
    }
}

/// Sends the helpers home at the end of the chain, also when it panicked.
struct End<'a>(&'a Team);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, SeqCst);
    }
}

/// Calls `body` with every number below `parts`, each once, in any order, on all threads of the team that this thread
/// leads, or of the rayon pool where it leads none.
pub(crate) fn for_each(parts: usize, body: impl Fn(usize) + Sync) {
    match ROLE.get() {
        _ if parts == 1 => body(0),
        Role::None => (0..parts).into_par_iter().with_max_len(1).for_each(&body),
        Role::Leader(team) => run(team, parts, &body),
        Role::InLoop => (0..parts).for_each(body),
    }
}

#[allow(unsafe_code)]
fn run(team: *const Team, parts: usize, body: &(dyn Fn(usize) + Sync)) {
    // SAFETY: it was this thread's role, which `scope` takes back before the team goes.
    let team = unsafe { &*team };
    // SAFETY: only the lifetime changes. Helpers use the pointer only while they are counted in `inside` of an open
    // job, and `Open::drop` closes the job and waits for them before this function returns or unwinds.
    let body: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(ptr::from_ref(body)) };
    team.job.set(Some(Job { body, parts }));
    team.claimed.0.store(0, SeqCst);
    team.front.0.store(0, SeqCst);
    team.epoch.0.fetch_add(1, SeqCst);
    let open = Open(team);
    // SAFETY: `body` is borrowed by this function.
    let body = unsafe { &*body };
    let mut back = parts;
    claim(team, parts, body, || {
        back -= 1;
        back
    });
    drop(open);
    assert!(!team.failed.load(SeqCst), "a part of a loop panicked on another thread");
}

/// Works through unclaimed parts until there are none. As many are handed out as there are, so that those that `next`
/// takes from the front and from the back never meet.
fn claim(team: &Team, parts: usize, body: &(dyn Fn(usize) + Sync), mut next: impl FnMut() -> usize) {
    let _in_loop = Acting::new(Role::InLoop);
    while team.claimed.0.fetch_add(1, SeqCst) < parts {
        body(next());
    }
}

/// An open job; closes it and waits for the helpers inside.
struct Open<'a>(&'a Team);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.epoch.0.fetch_add(1, SeqCst);
        wait(|| self.0.inside.0.load(SeqCst) == 0, || ());
    }
}

/// A helper inside a job; counts itself out, also when its part panicked.
struct Inside<'a>(&'a Team);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.failed.store(true, SeqCst);
        }
        self.0.inside.0.fetch_sub(1, SeqCst);
    }
}

impl Team {
    /// Takes part in jobs until the chain ends.
    #[allow(unsafe_code)]
    fn help(&self) {
        let is_open = || self.epoch.0.load(SeqCst) % 2 == 1;
        // The job that had no part left when this thread last looked.
        let mut finished = 0;
        loop {
            let is_needed = || (is_open() && self.epoch.0.load(SeqCst) != finished) || self.ended.load(SeqCst);
            wait(is_needed, || self.ahead.fetch());
            if self.ended.load(SeqCst) {
                return;
            }
            self.inside.0.fetch_add(1, SeqCst);
            let inside = Inside(self);
            let epoch = self.epoch.0.load(SeqCst);
            if epoch % 2 == 1 {
                if let Some(job) = self.job.get() {
                    // SAFETY: counted in, and the job was open after that: the leader keeps the body alive until this
                    // thread has counted itself out (`Open::drop`).
                    claim(self, job.parts, unsafe { &*job.body }, || self.front.0.fetch_add(1, SeqCst));
                }
                finished = epoch;
            }
            drop(inside);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_part_is_done_once() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let sum = pool.install(|| {
                scope(|| {
                    let mut sum = 0;
                    for parts in 0..300 {
                        let counts: Vec<AtomicU32> = (0..parts).map(|_| AtomicU32::new(0)).collect();
                        // Gone before it is fetched, long, or nothing: a hint changes no result.
                        read_ahead(&vec![0; parts * parts % 7 * 5000]);
                        for_each(parts, |part| {
                            counts[part].fetch_add(1, SeqCst);
                        });
                        assert!(counts.iter().all(|count| count.load(SeqCst) == 1));
                        sum += counts.len();
                    }
                    sum
                })
            });
            assert_eq!(sum, 299 * 300 / 2);
        }
    }

    #[test]
    fn loops_nest_and_scopes_meet() {
        let count = AtomicU32::new(0);
        let inner = |_| {
            scope(|| {
                for_each(5, |_| {
                    count.fetch_add(1, SeqCst);
                })
            })
        };
        let twice = || scope(|| for_each(7, inner));
        rayon::join(twice, twice);
        scope(twice);
        assert_eq!(count.load(SeqCst), 3 * 35);
    }

    #[test]
    fn panics_arrive() {
        let failing = |at: usize| {
            std::panic::catch_unwind(|| {
                scope(|| {
                    for_each(100, |part| assert_ne!(part, at));
                    1
                })
            })
        };
        assert!(failing(0).is_err() && failing(99).is_err() && failing(50).is_err());
        assert_eq!(failing(100).unwrap(), 1);
    }
}
