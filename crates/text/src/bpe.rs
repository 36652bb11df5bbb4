//! Byte-level byte-pair encoding for whole data sets: the tokens and offsets that the `tokenizers` crate gives, several
//! times as fast.
//!
//! The crate keeps, for every piece of a text, the text, its original and an alignment of each byte, and cuts words by
//! a backtracking regular expression. Here words are ranges of the text, found by a scanner for each of the rules that
//! models use ([`words`]), and the tokens of a short word come from a table of words that were seen before.
//!
//! Only what is known to give the same result is done here: [`Encoder::new`] refuses a tokenizer with any other step,
//! and [`Encoder::encode`] a text that needs one. The caller then asks the `tokenizers` crate.
mod classes;
mod pipeline;
mod words;

use aho_corasick::AhoCorasick;
use std::{
    cell::RefCell,
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};
use unicode_normalization::IsNormalized;
use words::Rule;

/// A text as tokens, with the offsets of each token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id the byte range of the text it came from. Tokens that share one character share its range.
    pub offsets: Vec<(usize, usize)>,
}

/// The tokens of a model with byte-level BPE, ready to encode.
#[derive(Debug)]
pub(crate) struct Encoder {
    /// Tells the tables of this encoder from those of others.
    identity: u64,
    rule: Rule,
    /// Whether texts are brought to normal form C first. Texts that are not in it are left to the caller.
    nfc: bool,
    /// Added tokens by their text: first those that are looked for in the text as it is, then those looked for between.
    added: [Option<(AhoCorasick, Vec<u32>)>; 2],
    /// The token of each byte.
    bytes: [Option<u32>; 256],
    merges: Merges,
    /// For models that take a word that is a token before they merge anything: the token of each such word.
    whole: Option<HashMap<Box<[u8]>, u32>>,
    /// By token; the length of tokens of the model, in bytes.
    lengths: Vec<u32>,
    trim: Option<Trim>,
}

/// Blanks at both ends of tokens, which offsets leave out.
#[derive(Debug)]
struct Trim {
    /// A first token that begins with one blank keeps it.
    keeps_first: bool,
    /// By token: how many characters stand before and after.
    blanks: Vec<(u16, u16)>,
}

/// A token that stands in a text as it is.
struct Found {
    start: usize,
    end: usize,
    id: u32,
}

impl Encoder {
    /// The encoder of `tokenizer`, or what it has that only the `tokenizers` crate can do.
    ///
    /// # Errors
    /// The step that is not supported, in words.
    pub(crate) fn new(tokenizer: &tokenizers::Tokenizer) -> Result<Self, String> {
        pipeline::encoder(tokenizer)
    }

    /// Tokens of `text`, as the `tokenizers` crate gives them without the special tokens around a text; their offsets
    /// too, if `with_offsets`. `None` for a text that is left to it: one that its normal form would change, or with a
    /// byte that the vocabulary lacks.
    pub(crate) fn encode(&self, text: &str, with_offsets: bool) -> Option<Encoded> {
        if self.nfc && !text.is_ascii() && unicode_normalization::is_nfc_quick(text.chars()) != IsNormalized::Yes {
            return None;
        }
        // Text gives about a token for every four bytes.
        let mut ids = Vec::with_capacity(text.len() / 3 + 4);
        let added = self.find_added(text);
        let mut at = 0;
        TABLE.with_borrow_mut(|table| {
            table.prepare(self.identity);
            for found in &added {
                self.encode_plain(&text[at..found.start], table, &mut ids)?;
                ids.push(found.id);
                at = found.end;
            }
            self.encode_plain(&text[at..], table, &mut ids)
        })?;
        let offsets = if with_offsets { self.offsets(text, &ids, &added) } else { Vec::new() };
        Some(Encoded { ids, offsets })
    }

    /// The added tokens in `text`, in order.
    fn find_added(&self, text: &str) -> Vec<Found> {
        let [first, second] = &self.added;
        let mut found = Vec::new();
        let search = |set: &Option<(AhoCorasick, Vec<u32>)>, start: usize, end: usize, found: &mut Vec<Found>| {
            if let Some((automaton, ids)) = set {
                found.extend(automaton.find_iter(&text[start..end]).map(|hit| Found {
                    start: start + hit.start(),
                    end: start + hit.end(),
                    id: ids[hit.pattern().as_usize()],
                }));
            }
        };
        search(first, 0, text.len(), &mut found);
        if second.is_some() {
            let outer = std::mem::take(&mut found);
            let mut at = 0;
            for hit in outer {
                search(second, at, hit.start, &mut found);
                at = hit.end;
                found.push(hit);
            }
            search(second, at, text.len(), &mut found);
        }
        found
    }

    /// Tokens of a text without added tokens.
    fn encode_plain(&self, text: &str, table: &mut Table, ids: &mut Vec<u32>) -> Option<()> {
        let bytes = text.as_bytes();
        let mut missing = false;
        words::for_each(text, self.rule, |start, end| {
            let Some(key) = Key::new(bytes, start, end) else {
                missing |= self.encode_word(&bytes[start..end], ids).is_none();
                return;
            };
            let hash = key.hash();
            if table.get(key, hash, ids) {
                return;
            }
            let before = ids.len();
            match self.encode_word(&bytes[start..end], ids) {
                Some(()) => table.insert(key, hash, &ids[before..]),
                None => missing = true,
            }
        });
        (!missing).then_some(())
    }

    /// Tokens of one word. `None` when a byte is in no token.
    fn encode_word(&self, word: &[u8], ids: &mut Vec<u32>) -> Option<()> {
        if let Some(&id) = self.whole.as_ref().and_then(|whole| whole.get(word)) {
            ids.push(id);
            return Some(());
        }
        let start = ids.len();
        for &byte in word {
            match self.bytes[usize::from(byte)] {
                Some(id) => ids.push(id),
                None => {
                    ids.truncate(start);
                    return None;
                }
            }
        }
        match word.len() {
            0 | 1 => {}
            2..=SHORT => self.merges.merge_short(ids, start),
            _ => self.merges.merge_long(ids, start),
        }
        Some(())
    }

    /// The offsets of each token. A token that begins or ends inside a character has all of it.
    fn offsets(&self, text: &str, ids: &[u32], added: &[Found]) -> Vec<(usize, usize)> {
        let mut added = added.iter().peekable();
        let mut at = 0;
        let mut offsets = Vec::with_capacity(ids.len());
        for (index, &id) in ids.iter().enumerate() {
            // At the offsets of an added token there is no other.
            let end = match added.next_if(|found| found.start == at) {
                Some(found) => found.end,
                None => at + self.lengths[id as usize] as usize,
            };
            let (mut first, mut last) = (text.floor_char_boundary(at), text.ceil_char_boundary(end));
            at = end;
            if let Some(trim) = &self.trim {
                let (mut before, behind) = trim.blanks[id as usize];
                if (index == 0 || first == 0) && trim.keeps_first && before == 1 {
                    before = 0;
                }
                let (before, behind) = (usize::from(before), usize::from(behind));
                first = last.min(first + before);
                if behind > 0 && last >= behind {
                    last = first.max(last - behind);
                }
            }
            offsets.push((first, last));
        }
        offsets
    }
}

/// Words of up to this many bytes are merged by looking at all pairs again and again.
const SHORT: usize = 40;

/// Which pairs of tokens become one, and in which order: a table with open addressing, since most questions are
/// answered with no.
#[derive(Debug)]
struct Merges {
    /// The pair, its rank and the token that it becomes; the rank of an empty entry is [`NONE`].
    entries: Box<[(u64, u32, u32)]>,
    shift: u32,
}

/// The rank of a pair that does not become a token.
const NONE: u32 = u32::MAX;

impl Merges {
    /// `merges` has the rank and the result of each pair.
    fn new(merges: &HashMap<(u32, u32), (u32, u32)>) -> Self {
        let size = (merges.len() * 2).next_power_of_two().max(2);
        let mut table = Self { entries: vec![(0, NONE, 0); size].into(), shift: 64 - size.trailing_zeros() };
        for (&(left, right), &(rank, id)) in merges {
            let pair = Self::pair(left, right);
            let mut at = table.place(pair);
            while table.entries[at].1 != NONE {
                at = (at + 1) % size;
            }
            table.entries[at] = (pair, rank, id);
        }
        table
    }

    fn pair(left: u32, right: u32) -> u64 {
        u64::from(left) << 32 | u64::from(right)
    }

    fn place(&self, pair: u64) -> usize {
        (pair.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize
    }

    /// Rank and result of a pair; [`NONE`] and anything when there is none.
    fn get(&self, left: u32, right: u32) -> (u32, u32) {
        let pair = Self::pair(left, right);
        let mut at = self.place(pair);
        loop {
            let (found, rank, id) = self.entries[at];
            if rank == NONE || found == pair {
                return (rank, id);
            }
            at = (at + 1) % self.entries.len();
        }
    }

    /// Merges `ids[start..]`, at most [`SHORT`] of them: of all pairs the one of the lowest rank, the first of equal
    /// ones, until there is none.
    fn merge_short(&self, ids: &mut Vec<u32>, start: usize) {
        let mut found = [(NONE, 0); SHORT];
        let mut count = ids.len() - start;
        let word = &mut ids[start..];
        for index in 0..count - 1 {
            found[index] = self.get(word[index], word[index + 1]);
        }
        loop {
            let (mut best, mut lowest) = (0, NONE);
            for (index, &(rank, _)) in found[..count - 1].iter().enumerate() {
                if rank < lowest {
                    (best, lowest) = (index, rank);
                }
            }
            if lowest == NONE {
                break;
            }
            word[best] = found[best].1;
            word.copy_within(best + 2..count, best + 1);
            found.copy_within(best + 1..count - 1, best);
            count -= 1;
            if best > 0 {
                found[best - 1] = self.get(word[best - 1], word[best]);
            }
            if best + 1 < count {
                found[best] = self.get(word[best], word[best + 1]);
            }
        }
        ids.truncate(start + count);
    }

    /// The same for words of any length, with a heap of pairs.
    fn merge_long(&self, ids: &mut Vec<u32>, start: usize) {
        use std::{cmp::Reverse, collections::BinaryHeap};
        const END: u32 = u32::MAX;
        let word = &mut ids[start..];
        let count = word.len();
        // Neighbours of each token that is left; one that was merged into the token before it has no `next` of its own.
        let mut next: Vec<u32> = (1..=count as u32).map(|i| if i as usize == count { END } else { i }).collect();
        let mut previous: Vec<u32> = (0..count as u32).map(|i| i.checked_sub(1).unwrap_or(END)).collect();
        let mut gone = vec![false; count];
        let mut heap = BinaryHeap::with_capacity(count);
        let push = |heap: &mut BinaryHeap<_>, word: &[u32], left: u32, right: u32| {
            let (rank, id) = self.get(word[left as usize], word[right as usize]);
            if rank != NONE {
                heap.push(Reverse((rank, left, id)));
            }
        };
        for index in 1..count as u32 {
            push(&mut heap, word, index - 1, index);
        }
        while let Some(Reverse((rank, left, id))) = heap.pop() {
            let at = left as usize;
            if gone[at] || next[at] == END {
                continue;
            }
            let right = next[at] as usize;
            // Whether the pair is still the one that was put on the heap.
            if self.get(word[at], word[right]) != (rank, id) {
                continue;
            }
            word[at] = id;
            gone[right] = true;
            next[at] = next[right];
            if next[at] != END {
                previous[next[at] as usize] = left;
                push(&mut heap, word, left, next[at]);
            }
            if previous[at] != END {
                push(&mut heap, word, previous[at], left);
            }
        }
        let mut kept = 0;
        for index in 0..count {
            if !gone[index] {
                word[kept] = word[index];
                kept += 1;
            }
        }
        ids.truncate(start + kept);
    }
}

/// A word of up to 16 bytes as two numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Key {
    low: u64,
    high: u64,
    length: u8,
}

impl Key {
    /// The word at `start..end` of `text`, if it is short enough.
    fn new(text: &[u8], start: usize, end: usize) -> Option<Self> {
        let length = end - start;
        if length > 16 {
            return None;
        }
        // Sixteen bytes are read where there are as many, and those after the word blanked out.
        let number = match text.get(start..start + 16).and_then(|bytes| bytes.try_into().ok()) {
            Some(bytes) => u128::from_le_bytes(bytes),
            None => {
                let mut bytes = [0; 16];
                bytes[..length].copy_from_slice(&text[start..end]);
                u128::from_le_bytes(bytes)
            }
        };
        let number = if length == 16 { number } else { number & ((1 << (8 * length)) - 1) };
        Some(Self { low: number as u64, high: (number >> 64) as u64, length: length as u8 })
    }

    /// A number in which every bit of the word counts.
    fn hash(self) -> u64 {
        let mixed = (self.low ^ self.high.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ self.high ^ u64::from(self.length)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed ^ mixed >> 32
    }
}

/// A word and its tokens.
#[derive(Clone, Copy, Debug)]
struct Slot<const MOST: usize> {
    low: u64,
    high: u64,
    length: u8,
    count: u8,
    ids: [u32; MOST],
}

/// The slots that a word may have. Of words of up to three tokens, nearly all, a pair is one line of the CPU's cache.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Pair<const MOST: usize>([Slot<MOST>; 2]);

/// Words of up to `MOST` tokens that were seen lately, and their tokens. A new word drives out the older one of its
/// pair.
struct Words<const MOST: usize> {
    pairs: Vec<Pair<MOST>>,
}

impl<const MOST: usize> Words<MOST> {
    const fn new() -> Self {
        Self { pairs: Vec::new() }
    }

    /// Reserves `count` pairs, a power of two, and forgets everything.
    fn empty(&mut self, count: usize) {
        self.pairs.clear();
        self.pairs.resize(count, Pair([Slot { low: 0, high: 0, length: 0, count: 0, ids: [0; MOST] }; 2]));
    }

    /// Appends the tokens of a word, if they are known.
    fn get(&self, key: Key, hash: u64, ids: &mut Vec<u32>) -> bool {
        let Pair(pair) = &self.pairs[hash as usize & (self.pairs.len() - 1)];
        let is_it = |slot: &&Slot<MOST>| (slot.low, slot.high, slot.length) == (key.low, key.high, key.length);
        match pair.iter().find(is_it) {
            Some(slot) if slot.count == 1 => ids.push(slot.ids[0]),
            Some(slot) => ids.extend_from_slice(&slot.ids[..usize::from(slot.count)]),
            None => return false,
        }
        true
    }

    fn insert(&mut self, key: Key, hash: u64, tokens: &[u32]) {
        let place = hash as usize & (self.pairs.len() - 1);
        let Pair(pair) = &mut self.pairs[place];
        pair[1] = pair[0];
        let slot = &mut pair[0];
        (slot.low, slot.high, slot.length, slot.count) = (key.low, key.high, key.length, tokens.len() as u8);
        slot.ids[..tokens.len()].copy_from_slice(tokens);
    }
}

/// Tokens of a word in the first and in the second list of a table.
const FEW: usize = 3;
const MORE: usize = 9;

/// Words that were seen lately, and their tokens: 2.5 MiB for the words that make up nearly all of a text.
struct Table {
    identity: u64,
    few: Words<FEW>,
    more: Words<MORE>,
}

thread_local! {
    static TABLE: RefCell<Table> = const { RefCell::new(Table { identity: 0, few: Words::new(), more: Words::new() }) };
}

/// Counts encoders.
static IDENTITY: AtomicU64 = AtomicU64::new(1);

fn next_identity() -> u64 {
    IDENTITY.fetch_add(1, Ordering::Relaxed)
}

impl Table {
    /// Empties the table if another encoder filled it.
    fn prepare(&mut self, identity: u64) {
        if self.identity != identity {
            self.identity = identity;
            self.few.empty(1 << 15);
            self.more.empty(1 << 12);
        }
    }

    fn get(&self, key: Key, hash: u64, ids: &mut Vec<u32>) -> bool {
        self.few.get(key, hash, ids) || self.more.get(key, hash, ids)
    }

    fn insert(&mut self, key: Key, hash: u64, tokens: &[u32]) {
        match tokens.len() {
            1..=FEW => self.few.insert(key, hash, tokens),
            4..=MORE => self.more.insert(key, hash, tokens),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
