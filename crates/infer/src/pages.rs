//! Who has which page of a KV cache, and which pages hold the beginning of a text that comes again.
//!
//! Sequences with a common beginning share the full pages of it. A page that no sequence uses any more keeps what it holds until its
//! memory is needed; the one that was not used for longest goes first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use tunesmith_tensor::PAGE;

/// What comes before the tokens of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Before {
    /// Nothing; the version of the adapter that the text goes through.
    Nothing(u64),
    /// The text of the page that was named so.
    Page(u64),
}

/// The text that a page stands for: its tokens, and all before them.
type Text = (Before, [u32; PAGE]);

#[derive(Debug, Default)]
struct Page {
    /// Sequences that use it.
    users: usize,
    /// What it holds, with a name that no other text ever has.
    text: Option<(Text, u64)>,
    /// When the last user gave it back.
    released: u64,
}

/// All pages of a cache.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    pages: Vec<Page>,
    /// Pages that hold nothing. The first ones go first, so that a sequence mostly has consecutive ones.
    free: BTreeSet<u32>,
    /// Pages without a user that hold a text, by when they were given back.
    idle: BTreeMap<u64, u32>,
    by_text: HashMap<Text, u32>,
    /// Counts names, and times at which pages are given back.
    clock: u64,
}

impl Pages {
    /// Adds free pages until there are `num`.
    pub(crate) fn grow(&mut self, num: usize) {
        self.free.extend(self.pages.len() as u32..num as u32);
        self.pages.resize_with(num.max(self.pages.len()), Page::default);
    }

    /// Number of pages.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Pages without a user.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Pages for `count` · PAGE tokens that begin with `prompt`, of which the first hold its beginning already; how many do, and what
    /// comes before the next one. Never all of the prompt: its last token always has to go through the model. `None` when not as many
    /// are available.
    pub(crate) fn take(&mut self, version: u64, prompt: &[u32], count: usize) -> Option<(Vec<u32>, usize, Before)> {
        let (mut taken, mut before) = (Vec::with_capacity(count), Before::Nothing(version));
        let mut num_idle = 0;
        for tokens in prompt[..prompt.len().saturating_sub(1)].as_chunks::<PAGE>().0.iter().take(count) {
            let Some(page) = self.by_text.get(&(before, *tokens)) else { break };
            let Page { users, text, .. } = &self.pages[*page as usize];
            let Some((_, name)) = text else { break };
            before = Before::Page(*name);
            num_idle += usize::from(*users == 0);
            taken.push(*page);
        }
        if count - taken.len() > self.available() - num_idle {
            return None;
        }
        for page in &taken {
            let Page { users, released, .. } = &mut self.pages[*page as usize];
            if *users == 0 {
                self.idle.remove(released);
            }
            *users += 1;
        }
        let known = taken.len();
        while taken.len() < count {
            let page = self.free.pop_first().or_else(|| self.evict())?;
            self.pages[page as usize].users = 1;
            taken.push(page);
        }
        Some((taken, known, before))
    }

    /// The page without a user that was not used for longest, which no longer holds anything.
    fn evict(&mut self) -> Option<u32> {
        let (_, page) = self.idle.pop_first()?;
        if let Some((text, _)) = self.pages[page as usize].text.take() {
            self.by_text.remove(&text);
        }
        Some(page)
    }

    /// Says that `page` now holds `tokens` after `before`; returns what comes before the next page.
    pub(crate) fn fill(&mut self, page: u32, before: Before, tokens: &[u32; PAGE]) -> Before {
        let text = (before, *tokens);
        // Another sequence may have come to the same text meanwhile: its page is the one that is found.
        let found = *self.by_text.entry(text).or_insert(page);
        if found == page {
            self.clock += 1;
            self.pages[page as usize].text = Some((text, self.clock));
        }
        self.pages[found as usize].text.map_or(before, |(_, name)| Before::Page(name))
    }

    /// Gives back the pages of a sequence. Those of its end go before those of its beginning when memory is needed.
    pub(crate) fn release(&mut self, pages: &[u32]) {
        for page in pages.iter().rev() {
            let Page { users, text, released } = &mut self.pages[*page as usize];
            *users -= 1;
            if *users > 0 {
                continue;
            }
            if text.is_some() {
                self.clock += 1;
                *released = self.clock;
                self.idle.insert(self.clock, *page);
            } else {
                self.free.insert(*page);
            }
        }
    }

    /// Forgets what all pages hold, of which none may have a user.
    pub(crate) fn clear(&mut self) {
        while let Some(page) = self.evict() {
            self.free.insert(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages(num: usize) -> Pages {
        let mut pages = Pages::default();
        pages.grow(num);
        pages
    }

    /// Takes pages for `text` and fills those that are full.
    fn hold(pages: &mut Pages, version: u64, text: &[u32]) -> Option<(Vec<u32>, usize)> {
        let (taken, known, mut before) = pages.take(version, text, text.len().div_ceil(PAGE))?;
        for (page, tokens) in taken.iter().zip(text.as_chunks::<PAGE>().0).skip(known) {
            before = pages.fill(*page, before, tokens);
        }
        Some((taken, known))
    }

    fn text(first: u32, len: u32) -> Vec<u32> {
        (first..first + len).collect()
    }

    #[test]
    fn a_common_beginning_is_shared_and_kept_until_memory_is_needed() {
        let mut pages = pages(8);
        let (a, known) = hold(&mut pages, 0, &text(0, 40)).unwrap();
        assert_eq!((a.as_slice(), known), (&[0, 1, 2][..], 0));
        let common = [text(0, 32), text(90, 10)].concat();
        let (b, known) = hold(&mut pages, 0, &common).unwrap();
        assert_eq!((b.as_slice(), known), (&[0, 1, 3][..], 2));
        // Another adapter, another text in front: nothing is shared.
        assert_eq!(hold(&mut pages, 1, &text(0, 32)).unwrap(), (vec![4, 5], 0));
        assert_eq!(hold(&mut pages, 0, &text(16, 32)).unwrap(), (vec![6, 7], 0));
        assert!(hold(&mut pages, 0, &text(500, 1)).is_none(), "no page is available");
        pages.release(&a);
        assert_eq!(pages.available(), 1, "two of them are shared");
        pages.release(&b);
        assert_eq!(pages.available(), 4);
        // The last token of a prompt is never taken as known, so of 32 tokens one page.
        let (again, known) = hold(&mut pages, 0, &text(0, 32)).unwrap();
        assert_eq!((again[0], known), (0, 1));
        pages.release(&again);
        // Memory is needed: all goes that nobody uses.
        let (large, known) = hold(&mut pages, 7, &text(1000, 64)).unwrap();
        assert_eq!((large.len(), known, pages.available()), (4, 0, 0));
        pages.release(&large);
        assert_eq!(hold(&mut pages, 0, &text(0, 40)).unwrap().1, 0, "it was forgotten");
    }

    #[test]
    fn the_end_of_a_text_goes_before_its_beginning() {
        let mut pages = pages(4);
        let (a, _) = hold(&mut pages, 0, &text(0, 64)).unwrap();
        pages.release(&a);
        let (b, _) = hold(&mut pages, 0, &text(900, 17)).unwrap();
        assert_eq!(b, [3, 2]);
        assert_eq!(pages.take(0, &text(0, 33), 2).unwrap().1, 2);
    }

    #[test]
    fn two_that_come_to_the_same_text_share_what_follows() {
        let mut pages = pages(9);
        let [(a, ..), (b, ..)] = [(); 2].map(|()| pages.take(0, &text(0, 48), 3).unwrap());
        let mut before = [Before::Nothing(0); 2];
        for (i, tokens) in text(0, 48).as_chunks::<PAGE>().0.iter().enumerate() {
            before = [pages.fill(a[i], before[0], tokens), pages.fill(b[i], before[1], tokens)];
            assert_eq!(before[0], before[1]);
        }
        pages.release(&a);
        pages.release(&b);
        assert_eq!((pages.free.len(), pages.idle.len()), (6, 3));
        pages.clear();
        assert_eq!((pages.free.len(), pages.by_text.len()), (9, 0));
    }

    proptest! {
        /// Whatever comes and goes: a page has one text or is free, and what is found is what was put there.
        #[test]
        fn no_page_is_lost(steps in proptest::collection::vec((0u32..6, 1u32..70, any::<bool>()), 1..60)) {
            let mut pages = pages(12);
            // The text of each page, as a model would see it.
            let mut written = vec![Vec::new(); 12];
            let mut held: Vec<Vec<u32>> = Vec::new();
            for (first, len, releases) in steps {
                if releases && !held.is_empty() {
                    pages.release(&held.remove(first as usize % held.len()));
                } else {
                    let text = text(first / 3, len);
                    if let Some((taken, known, mut before)) = pages.take(0, &text, text.len().div_ceil(PAGE)) {
                        for (i, page) in taken.iter().enumerate() {
                            let upto = text[..text.len().min((i + 1) * PAGE)].to_vec();
                            if i < known {
                                prop_assert_eq!(&written[*page as usize], &upto);
                            } else {
                                written[*page as usize] = upto;
                                if let Some(tokens) = text.as_chunks::<PAGE>().0.get(i) {
                                    before = pages.fill(*page, before, tokens);
                                }
                            }
                        }
                        held.push(taken);
                    }
                }
                let mut used: Vec<u32> = held.iter().flatten().copied().collect();
                used.sort_unstable();
                used.dedup();
                prop_assert_eq!(used.len() + pages.available(), 12);
            }
        }
    }
}
