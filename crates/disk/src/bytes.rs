//! Integers in images of any byte order. What lies outside the bytes reads as zero, so that
//! nothing here can panic; callers check lengths where a short table matters.

fn part<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    at.checked_add(N)
        .and_then(|end| b.get(at..end))
        .and_then(|b| b.try_into().ok())
        .unwrap_or([0; N])
}

macro_rules! readers {
    ($($name:ident $type:ident $from:ident;)*) => {$(
        #[doc = concat!("A ", stringify!($type), " at `at`.")]
        pub(crate) fn $name(b: &[u8], at: usize) -> $type {
            $type::$from(part(b, at))
        }
    )*};
}

readers! {
    be16 u16 from_be_bytes;
    be32 u32 from_be_bytes;
    be64 u64 from_be_bytes;
    le16 u16 from_le_bytes;
    le32 u32 from_le_bytes;
    le64 u64 from_le_bytes;
}

/// Stores bytes at `at` if there is room.
pub(crate) fn put(b: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = at
        .checked_add(value.len())
        .and_then(|end| b.get_mut(at..end))
    {
        place.copy_from_slice(value);
    }
}
