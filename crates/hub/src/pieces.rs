//! How the bytes of an object come: in one answer, or, of a large one, in ranges of which several are asked for at once.

use crate::objects::Object;
use futures_util::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use object_store::{GetOptions, GetRange, GetResult, ObjectStore};

/// Bytes of an object from which on it is asked for in ranges.
const RANGED: u64 = 32 << 20;
/// Bytes of a range.
const RANGE: u64 = 8 << 20;
/// Ranges that are asked for at once, and held in memory at most.
const CONCURRENT: usize = 4;

impl Object {
    /// Whether it is large, and its ranges cannot be of different states unnoticed.
    pub(crate) fn goes_in_ranges(&self) -> bool {
        self.meta.size >= RANGED && self.condition().is_some()
    }

    /// What a request can be made conditional upon; a weak ETag cannot be that.
    fn condition(&self) -> Option<String> {
        self.meta.e_tag.clone().filter(|etag| !etag.starts_with("W/"))
    }

    /// Asks for it, or a range of it, in the version that is known.
    async fn get(&self, store: &dyn ObjectStore, range: Option<GetRange>) -> object_store::Result<GetResult> {
        let options = GetOptions { if_match: self.condition(), range, ..GetOptions::default() };
        let answer = store.get_opts(&self.location, options).await?;
        // A server may not look at the condition.
        if answer.meta.size != self.meta.size || answer.meta.e_tag != self.meta.e_tag {
            return Err(object_store::Error::Precondition {
                path: self.path.clone(),
                source: "its size or ETag changed while it was fetched".into(),
            });
        }
        Ok(answer)
    }

    /// The bytes of an object from `from` on, in their order: of one answer, or of ranges of which several are asked for at once.
    pub(crate) fn pieces<'a>(
        &'a self,
        store: &'a dyn ObjectStore,
        from: u64,
        in_ranges: bool,
    ) -> BoxStream<'a, object_store::Result<Vec<u8>>> {
        if !in_ranges {
            let range = (from > 0).then_some(GetRange::Offset(from));
            return stream::once(self.get(store, range))
                .map_ok(GetResult::into_stream)
                .try_flatten()
                .map_ok(Vec::from)
                .boxed();
        }
        let starts = (from..self.meta.size).step_by(RANGE as usize);
        let ranges = starts.map(move |start| start..self.meta.size.min(start + RANGE));
        stream::iter(ranges)
            .map(move |range| async move {
                self.get(store, Some(GetRange::Bounded(range))).await?.bytes().await.map(Vec::from)
            })
            .buffered(CONCURRENT)
            .boxed()
    }
}
