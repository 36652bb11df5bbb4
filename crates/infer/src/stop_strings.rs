//! Texts at which generation ends.

/// Finds stop strings in a text that arrives in pieces, and holds back what might be the beginning of one.
#[derive(Debug)]
pub struct StopStrings<'a> {
    stops: &'a [String],
    held: String,
}

impl<'a> StopStrings<'a> {
    /// Looks for any of `stops`, none of them empty.
    pub fn new(stops: &'a [String]) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece; returns the text that is certain not to belong to a stop string, and whether one is
    /// complete: then the text ends here. Of several, the one that is complete first counts.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = found.min() {
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |i: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*i..]));
        let certain = self.held.char_indices().map(|(i, _)| i).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text held back, now that nothing follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut search = StopStrings::new(&stops);
        let mut shown = Vec::new();
        for piece in pieces {
            let (certain, complete) = search.push(piece);
            shown.push(certain);
            if complete {
                return (shown, true);
            }
        }
        shown.push(search.finish());
        (shown, false)
    }

    #[test]
    fn beginnings_of_stop_strings_are_held_back() {
        assert_eq!(run(&["###"], &["a#", "#b", "##", "#c"]).0, ["a", "##b", "", ""]);
        assert!(run(&["###"], &["a##", "#"]).1);
        assert_eq!(run(&["\nUser:"], &["hi\n", "Use"]).0, ["hi", "", "\nUse"]);
        assert_eq!(run(&[], &["a", "b"]), (vec!["a".into(), "b".into(), String::new()], false));
    }

    #[test]
    fn the_string_that_is_complete_first_counts() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), (vec!["xa".into()], true));
        assert_eq!(run(&["abcd", "bc"], &["xab", "cd"]).0.concat(), "xa");
        assert_eq!(run(&["é"], &["caf", "é!"]).0.concat(), "caf");
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[abé]{0,30}", stops in proptest::collection::vec("[abé]{1,4}", 0..3), size in 1..5usize) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            // The plain way: add characters until some stop string is there.
            let mut want = (text.clone(), false);
            let mut read = String::new();
            for character in text.chars() {
                read.push(character);
                if let Some(start) = stops.iter().filter_map(|s| read.find(s)).min() {
                    want = (read[..start].to_owned(), true);
                    break;
                }
            }
            let characters: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = characters.chunks(size).map(|c| c.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (shown, complete) = run(&stops, &pieces);
            prop_assert_eq!((shown.concat(), complete), want);
        }
    }
}
