//! What the int8 kernels of all instruction sets share: their levels, a register tile, a quantised row.

use crate::cpu::view::Shared;
use half::f16;
use std::sync::OnceLock;

/// Columns of a group: the 32-bit lanes of a 512-bit register.
pub(crate) const GROUP: usize = 16;

/// Groups of a strip: the widest tile.
pub(crate) const STRIP_GROUPS: usize = 3;

/// Instruction sets with a kernel of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// Plain Rust.
    Portable,
    /// AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2, F16C and the 256-bit dot products of AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// Every level that this CPU has, the best one last.
    pub(crate) fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            levels.push(Self::Avx2);
            if is_x86_feature_detected!("avxvnni") {
                levels.push(Self::AvxVnni);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                levels.push(Self::Avx512);
            }
        }
        levels
    }

    /// The best one; probed once.
    pub(crate) fn best() -> Self {
        static LEVEL: OnceLock<Level> = OnceLock::new();
        *LEVEL.get_or_init(|| Self::available().into_iter().next_back().unwrap_or(Self::Portable))
    }

    /// Rows and groups of the largest tile, which are what the registers hold.
    pub(crate) fn tile(self) -> (usize, usize) {
        match self {
            Self::Portable => (4, 1),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::AvxVnni => (2, 1),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => (4, STRIP_GROUPS),
        }
    }

    /// Whether the kernel takes two codes per byte.
    pub(crate) fn reads_nibbles(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => true,
            _ => false,
        }
    }
}

/// The operands of one register tile: `num_rows` rows by `num_groups` groups over `blocks` blocks.
pub(crate) struct Tile<'a> {
    pub num_rows: usize,
    pub num_groups: usize,
    pub blocks: usize,
    /// Steps of four elements in a block.
    pub steps: usize,
    /// Codes from the tile's first block on; groups are `codes_stride` bytes apart.
    pub codes: &'a [u8],
    pub codes_stride: usize,
    /// Scales (minima) from the first block on; groups are `scales_stride` apart.
    pub scales: &'a [f16],
    pub minima: Option<&'a [f16]>,
    pub scales_stride: usize,
    /// Activations from the first row and block on; rows are `x_stride` elements or `x_blocks` blocks apart.
    pub x: &'a [i8],
    pub x_stride: usize,
    pub x_scales: &'a [f32],
    pub x_offsets: &'a [i32],
    pub x_sums: &'a [f32],
    pub x_blocks: usize,
    pub unit: f32,
    /// Destination: `width` elements from `y_start` on, rows `y_stride` apart.
    pub y: Shared,
    pub y_start: usize,
    pub y_stride: usize,
    pub width: usize,
    /// Add to what is there.
    pub accumulate: bool,
}

impl Tile<'_> {
    /// Panics unless all that a kernel reads lies inside the slices. `codes_per_byte` is 1 or 2.
    pub(crate) fn check(&self, codes_per_byte: usize) {
        let (rows, groups, blocks) = (self.num_rows, self.num_groups, self.blocks);
        assert!(rows > 0 && groups > 0 && blocks > 0, "an empty tile");
        let block_bytes = self.steps * 4 * GROUP / codes_per_byte;
        assert!(self.codes.len() >= (groups - 1) * self.codes_stride + blocks * block_bytes);
        let scales = (groups - 1) * self.scales_stride + blocks * GROUP;
        assert!(self.scales.len() >= scales && self.minima.is_none_or(|m| m.len() >= scales));
        assert!(self.x.len() >= (rows - 1) * self.x_stride + blocks * self.steps * 4);
        let x_blocks = (rows - 1) * self.x_blocks + blocks;
        assert!(self.x_scales.len() >= x_blocks && self.x_offsets.len() >= x_blocks && self.x_sums.len() >= x_blocks);
        assert!(self.width > (groups - 1) * GROUP && self.width <= groups * GROUP);
    }

    /// The tile's elements of row `r`.
    ///
    /// # Safety
    /// No other thread touches the tile's elements of the destination.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(crate) unsafe fn y_row(&self, r: usize) -> &mut [f32] {
        // SAFETY: the caller's promise is the one that `slice` asks for.
        unsafe { self.y.slice(self.y_start + r * self.y_stride, self.width) }
    }
}

/// Blocks whose largest element is below this count as zero: their reciprocal scale would overflow.
const TINY: f32 = 1e-30;

/// Where the quantised form of one row goes: codes (filled up to whole blocks with zeros), and for each block its
/// scale, −128 · Σ codes, and scale · Σ codes.
pub(crate) struct QuantizedRow<'a> {
    pub codes: &'a mut [i8],
    pub scales: &'a mut [f32],
    pub offsets: &'a mut [i32],
    pub sums: &'a mut [f32],
}

/// Scale and reciprocal scale of a block, given the bits of its largest magnitude.
///
/// The largest magnitude is found on bit patterns, in which infinity and NaN are the largest, so that a block that
/// holds one gets it as its scale and every product shows it.
#[inline(always)]
pub(crate) fn scale_of(largest_bits: i32) -> (f32, f32) {
    let largest = f32::from_bits(largest_bits as u32);
    if largest < TINY { (0.0, 0.0) } else { (largest * (1.0 / 127.0), 127.0 / largest) }
}
