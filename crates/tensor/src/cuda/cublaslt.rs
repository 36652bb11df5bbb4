//! Matrix products by cuBLASLt: bf16 or f32 operands, the latter as they are or, if asked for, rounded to TF32; sums in
//! f32; the algorithm for a shape is asked for once.
//!
//! cuBLASLt's matrices are column-major. A row-major matrix is the transpose of the column-major one with the same
//! memory, so cᵀ = bᵀ aᵀ is asked for: the operands are exchanged and nothing is copied.

use super::error::Error;
use super::library::{Library, Search, functions};
use super::work::{self, Product, locked};
use crate::dtype::Dtype;
use cudarc::cublaslt::sys as lt;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::Mutex;

functions! {
    /// The functions of cuBLASLt that are used.
    Api, Library::CublasLt;
    create = "cublasLtCreate"(*mut *mut c_void);
    destroy = "cublasLtDestroy"(*mut c_void);
    desc_create = "cublasLtMatmulDescCreate"(*mut *mut c_void, u32, u32);
    desc_set = "cublasLtMatmulDescSetAttribute"(*mut c_void, u32, *const c_void, usize);
    desc_destroy = "cublasLtMatmulDescDestroy"(*mut c_void);
    layout_create = "cublasLtMatrixLayoutCreate"(*mut *mut c_void, u32, u64, u64, i64);
    layout_destroy = "cublasLtMatrixLayoutDestroy"(*mut c_void);
    preference_create = "cublasLtMatmulPreferenceCreate"(*mut *mut c_void);
    preference_set = "cublasLtMatmulPreferenceSetAttribute"(*mut c_void, u32, *const c_void, usize);
    preference_destroy = "cublasLtMatmulPreferenceDestroy"(*mut c_void);
    heuristic = "cublasLtMatmulAlgoGetHeuristic"(
        *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, i32, *mut Heuristic, *mut i32
    );
    matmul = "cublasLtMatmul"(
        *mut c_void, *mut c_void, *const c_void, *const c_void, *mut c_void, *const c_void, *mut c_void, *const c_void,
        *const c_void, *mut c_void, *mut c_void, *mut c_void, *const Algo, *mut c_void, usize, *mut c_void
    );
}

/// `cublasLtMatmulAlgo_t`.
pub(super) type Algo = [u64; 8];

/// `cublasLtMatmulHeuristicResult_t`, with the status as a plain integer.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Heuristic {
    algo: Algo,
    workspace: usize,
    state: i32,
    waves: f32,
    reserved: [i32; 4],
}

const _: () = assert!(size_of::<Heuristic>() == size_of::<lt::cublasLtMatmulHeuristicResult_t>());

/// Bytes that products may use beside their operands: what NVIDIA recommends for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;

/// Everything that an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    operands: [Operand; 3],
    accumulates: bool,
    tf32: bool,
}

impl Key {
    /// How cuBLASLt computes: f32 operands are exact unless TF32 is asked for.
    fn compute(&self) -> u32 {
        use lt::cublasComputeType_t::{CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32};
        (if self.tf32 { CUBLAS_COMPUTE_32F_FAST_TF32 } else { CUBLAS_COMPUTE_32F }) as u32
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Operand {
    dtype: Dtype,
    stride: usize,
    transposed: bool,
    /// Largest power of two, up to 256, that divides the address.
    alignment: u32,
}

impl Operand {
    fn new(operand: &work::Operand) -> Self {
        let work::Operand { address, dtype, stride, transposed } = *operand;
        Self { dtype, stride, transposed, alignment: 1 << address.trailing_zeros().min(8) }
    }

    fn kind(self) -> u32 {
        match self.dtype {
            Dtype::F32 => lt::cudaDataType_t::CUDA_R_32F as u32,
            Dtype::BF16 => lt::cudaDataType_t::CUDA_R_16BF as u32,
        }
    }
}

/// A product that is ready to run.
struct Plan {
    desc: *mut c_void,
    /// Of cuBLASLt's first and second operand and the result.
    layouts: [*mut c_void; 3],
    algo: Algo,
}

struct State {
    handle: *mut c_void,
    plans: HashMap<Key, Plan>,
    /// Address of the workspace, 0 before the first product.
    workspace: u64,
}
// SAFETY: the handles are used under the mutex only, and cuBLASLt does not tie them to a thread.
#[allow(unsafe_code)]
unsafe impl Send for State {}

pub(super) struct CublasLt {
    state: Mutex<State>,
    api: Api,
}

fn check(call: &str, status: i32) -> Result<(), Error> {
    if status == 0 { Ok(()) } else { Err(Error::Call { call: call.into(), what: format!("status {status}") }) }
}

impl CublasLt {
    pub(super) fn open(search: &Search, newest: u32) -> Result<Self, Error> {
        let (library, path) = search.open(Library::CublasLt, newest)?;
        let api = Api::load(library, &path)?;
        Ok(Self { state: Mutex::new(State { handle: ptr::null_mut(), plans: HashMap::new(), workspace: 0 }), api })
    }

    /// Asks for the product on `stream`; `allocate` gives the workspace at the first one. A context must be current.
    #[allow(unsafe_code)]
    pub(super) fn gemm(
        &self,
        product: &Product,
        stream: *mut c_void,
        allocate: impl FnOnce(usize) -> Result<u64, Error>,
    ) -> Result<(), Error> {
        let mut state = locked(&self.state);
        if state.handle.is_null() {
            let mut handle = ptr::null_mut();
            // SAFETY: a context is current; the handle is destroyed when this value is dropped.
            check("cublasLtCreate", unsafe { (self.api.create)(&mut handle) })?;
            state.handle = handle;
        }
        if state.workspace == 0 {
            state.workspace = allocate(WORKSPACE)?;
        }
        let key = Key {
            sizes: [product.m, product.n, product.k],
            operands: [&product.a, &product.b, &product.c].map(Operand::new),
            accumulates: product.beta != 0.0,
            tf32: product.tf32,
        };
        if !state.plans.contains_key(&key) {
            let plan = self.plan(state.handle, &key)?;
            state.plans.insert(key, plan);
        }
        let State { handle, plans, workspace } = &*state;
        let plan = &plans[&key];
        let (a, b) = (product.a.address as *const c_void, product.b.address as *const c_void);
        let c = product.c.address;
        // SAFETY: the plan was made for these sizes, strides, types and alignments; `Gemm::check` has shown that the
        // operands lie in their buffers; factors are f32 as the description says; the workspace has the size that is
        // named and is used by one product after the other, since all run in one stream.
        let status = unsafe {
            (self.api.matmul)(
                *handle,
                plan.desc,
                ptr::from_ref(&product.alpha).cast(),
                b,
                plan.layouts[0],
                a,
                plan.layouts[1],
                ptr::from_ref(&product.beta).cast(),
                c as *const c_void,
                plan.layouts[2],
                c as *mut c_void,
                plan.layouts[2],
                &plan.algo,
                *workspace as *mut c_void,
                WORKSPACE,
                stream,
            )
        };
        check("cublasLtMatmul", status)
    }

    #[allow(unsafe_code)]
    fn plan(&self, handle: *mut c_void, key: &Key) -> Result<Plan, Error> {
        let [m, n, k] = key.sizes;
        let [a, b, c] = key.operands;
        let f32s = lt::cudaDataType_t::CUDA_R_32F as u32;
        let mut desc = ptr::null_mut();
        // SAFETY: descriptions live as long as the plan, which lives as long as the library.
        let status = unsafe { (self.api.desc_create)(&mut desc, key.compute(), f32s) };
        check("cublasLtMatmulDescCreate", status)?;
        use lt::cublasLtMatmulDescAttributes_t::{CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB};
        for (attribute, operand) in [(CUBLASLT_MATMUL_DESC_TRANSA, b), (CUBLASLT_MATMUL_DESC_TRANSB, a)] {
            let value = u32::from(operand.transposed);
            // SAFETY: CUBLAS_OP_N is 0 and CUBLAS_OP_T is 1, integers of 4 bytes.
            let status =
                unsafe { (self.api.desc_set)(desc, attribute as u32, ptr::from_ref(&value).cast(), size_of::<u32>()) };
            check("cublasLtMatmulDescSetAttribute", status)?;
        }
        // Rows and columns as stored, column-major: those of the row-major matrix, exchanged.
        let stored = |rows: usize, cols: usize, transposed: bool| if transposed { (rows, cols) } else { (cols, rows) };
        let shapes = [stored(k, n, b.transposed), stored(m, k, a.transposed), (n, m)];
        let mut layouts = [ptr::null_mut(); 3];
        for ((layout, (rows, cols)), operand) in layouts.iter_mut().zip(shapes).zip([b, a, c]) {
            // SAFETY: as for the description.
            let status = unsafe {
                (self.api.layout_create)(layout, operand.kind(), rows as u64, cols as u64, operand.stride as i64)
            };
            check("cublasLtMatrixLayoutCreate", status)?;
        }
        let algo = self.algorithm(handle, desc, layouts, [b.alignment, a.alignment, c.alignment]).map_err(|e| {
            let Error::Call { call, what } = e else { return e };
            Error::Call { call, what: format!("{what} for {key:?}") }
        })?;
        Ok(Plan { desc, layouts, algo })
    }

    #[allow(unsafe_code)]
    fn algorithm(
        &self,
        handle: *mut c_void,
        desc: *mut c_void,
        layouts: [*mut c_void; 3],
        alignments: [u32; 3],
    ) -> Result<Algo, Error> {
        let mut preference = ptr::null_mut();
        // SAFETY: destroyed below.
        check("cublasLtMatmulPreferenceCreate", unsafe { (self.api.preference_create)(&mut preference) })?;
        use lt::cublasLtMatmulPreferenceAttributes_t as P;
        let set = |attribute: P, bytes: &[u8]| {
            // SAFETY: the bytes are those of the attribute's type: u64 for the workspace, u32 for alignments.
            let status =
                unsafe { (self.api.preference_set)(preference, attribute as u32, bytes.as_ptr().cast(), bytes.len()) };
            check("cublasLtMatmulPreferenceSetAttribute", status)
        };
        let [a, b, c] = alignments.map(u32::to_ne_bytes);
        let result = set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE as u64).to_ne_bytes())
            .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a))
            .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &b))
            .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c))
            .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c))
            .and_then(|()| {
                let (mut found, mut count) = (Heuristic::default(), 0);
                let [first, second, result] = layouts;
                // SAFETY: all handles are alive; one result is asked for and there is room for one.
                let status = unsafe {
                    (self.api.heuristic)(
                        handle, desc, first, second, result, result, preference, 1, &mut found, &mut count,
                    )
                };
                check("cublasLtMatmulAlgoGetHeuristic", status)?;
                let state = if count == 0 { 15 } else { found.state };
                check("cublasLtMatmulAlgoGetHeuristic", state).map(|()| found.algo)
            });
        // SAFETY: created above and not used again.
        unsafe { (self.api.preference_destroy)(preference) };
        result
    }
}

impl CublasLt {
    /// Gives everything back while the context is still there; the next product would begin anew.
    #[allow(unsafe_code)]
    pub(super) fn close(&self) {
        let mut state = locked(&self.state);
        for (_, plan) in state.plans.drain() {
            // SAFETY: layouts and description were created by this library and are not used again. That giving them
            // back may fail costs their memory.
            unsafe {
                plan.layouts.iter().for_each(|layout| {
                    (self.api.layout_destroy)(*layout);
                });
                (self.api.desc_destroy)(plan.desc);
            }
        }
        let handle = std::mem::replace(&mut state.handle, ptr::null_mut());
        if !handle.is_null() {
            // SAFETY: as above.
            unsafe { (self.api.destroy)(handle) };
        }
        state.workspace = 0;
    }
}
