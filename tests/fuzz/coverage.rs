//! Which branches a run took, where the program is compiled to count them, as `scripts/check-faults` does:
//! `RUSTFLAGS='-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters'`.
//! Elsewhere nothing is counted.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

static START: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static LENGTH: AtomicUsize = AtomicUsize::new(0);

/// Each part of the program calls it before `main`, with the counters of the whole program.
// SAFETY: the name is the one that LLVM calls; nothing else has it.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, end: *mut u8) {
    START.store(start, Ordering::Relaxed);
    LENGTH.store(
        (end as usize).saturating_sub(start as usize),
        Ordering::Relaxed,
    );
}

/// What all runs so far have taken.
pub struct Coverage {
    /// Bits of each counter: how often, about, a branch was taken in a run.
    seen: Vec<u8>,
}

impl Coverage {
    pub fn new() -> Self {
        Self {
            seen: vec![0; LENGTH.load(Ordering::Relaxed)],
        }
    }

    /// Branches that some run took.
    pub fn branches(&self) -> usize {
        self.seen.iter().filter(|bits| **bits != 0).count()
    }

    /// Whether the run took a branch that none took before, or took one more often than before, about.
    pub fn is_new(&mut self, run: impl FnOnce()) -> bool {
        each(self.seen.len(), |_, _| ());
        run();
        let mut new = false;
        each(self.seen.len(), |at, count| {
            let bits = 1 << (7 - count.leading_zeros());
            new |= self.seen[at] & bits == 0;
            self.seen[at] |= bits;
        });
        new
    }
}

/// Does this for every counter that is not zero, and sets it to zero.
fn each(length: usize, mut visit: impl FnMut(usize, u8)) {
    let start = START.load(Ordering::Relaxed);
    for at in 0..length {
        // SAFETY: inside the counters, which live as long as the program. Other threads may count meanwhile, as they do among each other.
        unsafe {
            let counter = start.add(at);
            let count = counter.read_volatile();
            if count != 0 {
                counter.write_volatile(0);
                visit(at, count);
            }
        }
    }
}
