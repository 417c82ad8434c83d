// SPDX-License-Identifier: GPL-2.0

//! Kernel threads.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use core::{
    mem::transmute,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    error::from_err_ptr,
    ffi::{
        c_int,
        c_void, //
    },
    prelude::*, //
};

const SIGKILL: c_int = bindings::SIGKILL as c_int;

/// The handler that marks a signal as handled by a kernel thread (`SIG_KTHREAD`), which is a cast
/// that `bindgen` cannot evaluate.
const SIG_KTHREAD: usize = 2;

/// A kernel thread, killed and joined when dropped.
///
/// Killing means a pending `SIGKILL`, which ends the interruptible and killable sleeps of the
/// thread, page faults that wait for user space included; the thread's function is expected to
/// return then. Dropping may sleep, and must not happen on the thread itself.
///
/// # Invariants
///
/// `task` is a thread created by `kthread_create_on_node()`, and this value owns a reference to
/// it. `closure` is what the thread function got as its argument.
pub struct KThread {
    task: NonNull<bindings::task_struct>,
    closure: NonNull<c_void>,
    reclaim: unsafe fn(NonNull<c_void>),
}

// SAFETY: A thread may be stopped from any other thread, and `closure` is only touched again when
// the thread never ran; closures are `Send`.
unsafe impl Send for KThread {}
// SAFETY: There are no `&self` methods.
unsafe impl Sync for KThread {}

impl KThread {
    /// Starts a thread named `name` that runs `f`.
    ///
    /// May sleep.
    pub fn run<F>(name: &CStr, f: F) -> Result<Self>
    where
        F: FnOnce() + Send + 'static,
    {
        let closure = KBox::into_raw(KBox::new(f, GFP_KERNEL)?);

        // SAFETY: The format takes exactly the one string that follows; `thread_fn::<F>` gets
        // back the box it expects.
        let task = from_err_ptr(unsafe {
            bindings::kthread_create_on_node(
                Some(Self::thread_fn::<F>),
                closure.cast(),
                bindings::NUMA_NO_NODE,
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        })
        .inspect_err(|_| {
            // SAFETY: The thread was not created, so the box is still ours.
            drop(unsafe { KBox::from_raw(closure) });
        })?;

        // SAFETY: A new thread does not exit before it is woken up, so `task` is valid.
        unsafe { bindings::get_task_struct(task) };
        // SAFETY: We own a reference now.
        unsafe { bindings::wake_up_process(task) };

        // INVARIANT: We just took the reference, and `closure` is the argument passed above.
        Ok(Self {
            // SAFETY: `from_err_ptr()` excluded errors and the function never returns NULL.
            task: unsafe { NonNull::new_unchecked(task) },
            // SAFETY: A box is never NULL.
            closure: unsafe { NonNull::new_unchecked(closure.cast()) },
            reclaim: Self::reclaim::<F>,
        })
    }

    /// The function of the thread.
    ///
    /// # Safety
    ///
    /// `data` must come from `KBox::<F>::into_raw()`; this function takes ownership.
    unsafe extern "C" fn thread_fn<F: FnOnce()>(data: *mut c_void) -> c_int {
        // SAFETY: A pointer-sized integer other than 0 is a valid bit pattern of a function
        // pointer, and this one is a marker that nobody calls.
        let handler = unsafe { transmute::<usize, bindings::__sighandler_t>(SIG_KTHREAD) };
        // What `allow_signal()` does: without a handler the signal would be dropped.
        //
        // SAFETY: Sets the handler of the current thread, for a valid signal.
        unsafe { bindings::kernel_sigaction(SIGKILL, handler) };

        // SAFETY: By the safety requirements of this function.
        let f = unsafe { KBox::<F>::from_raw(data.cast()) };
        // A signal that came before there was a handler is lost, but then this is set.
        //
        // SAFETY: Called on a kernel thread.
        if !unsafe { bindings::kthread_should_stop() } {
            KBox::into_inner(f)();
        }
        0
    }

    /// Drops the closure of a thread that never ran.
    ///
    /// # Safety
    ///
    /// As for [`Self::thread_fn`].
    unsafe fn reclaim<F>(data: NonNull<c_void>) {
        // SAFETY: By the safety requirements of this function.
        drop(unsafe { KBox::<F>::from_raw(data.as_ptr().cast()) });
    }
}

impl Drop for KThread {
    fn drop(&mut self) {
        // SAFETY: By the type invariant we own a reference, so the task is valid, dead or alive.
        unsafe { bindings::send_sig(SIGKILL, self.task.as_ptr(), 1) };
        // SAFETY: By the type invariant the task is a kthread, and the reference that this call
        // puts is ours.
        let ret = unsafe { bindings::kthread_stop_put(self.task.as_ptr()) };
        if ret == EINTR.to_errno() {
            // The thread was told to stop before it ever called `thread_fn`.
            //
            // SAFETY: So nobody took ownership of the closure.
            unsafe { (self.reclaim)(self.closure) };
        }
    }
}
