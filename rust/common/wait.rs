// SPDX-License-Identifier: GPL-2.0

//! Waiting on somebody else's wait queue.
//!
//! [`kernel::sync::CondVar`] is for queues of one's own.
//!
//! C header: [`include/linux/wait.h`](srctree/include/linux/wait.h)

use kernel::{
    bindings,
    current,
    ffi::c_long,
    prelude::*,
    task::MAX_SCHEDULE_TIMEOUT,
    time::Jiffies,
    types::{
        NotThreadSafe,
        Opaque, //
    }, //
};

/// The current task as an entry of a wait queue.
///
/// What is waited for has to be looked at after each return of [`Self::wait`], and before the
/// first one: a wake-up that comes after the look ends the wait at once.
///
/// # Invariants
///
/// `entry` is in the queue `queue`, which is valid.
#[pin_data(PinnedDrop)]
pub(crate) struct Waiter {
    queue: *mut bindings::wait_queue_head,
    #[pin]
    entry: Opaque<bindings::wait_queue_entry>,
    /// The entry is for the task that has made it.
    _not_send: NotThreadSafe,
}

impl Waiter {
    /// Puts the current task on the queue `head`.
    ///
    /// # Safety
    ///
    /// `head` must be valid as long as the result exists.
    pub(crate) unsafe fn new(head: *mut bindings::wait_queue_head) -> impl PinInit<Self> {
        let entry = bindings::wait_queue_entry {
            func: Some(bindings::woken_wake_function),
            private: current!().as_ptr().cast(),
            ..Default::default()
        };
        // INVARIANT: The entry is put in, and taken out when it is dropped.
        pin_init!(Self {
            queue: head,
            entry <- Opaque::ffi_init(move |slot: *mut bindings::wait_queue_entry| {
                // SAFETY: `slot` may be written to.
                unsafe { slot.write(entry) };
                // SAFETY: The queue is valid by the safety requirements of this function; the entry
                // is pinned, and taken out before it goes away.
                unsafe { bindings::add_wait_queue(head, slot) };
            }),
            _not_send: NotThreadSafe,
        })
    }

    /// Sleeps until somebody wakes the queue, has done so since the last call, a signal is
    /// pending or the time is over.
    pub(crate) fn wait(&self, jiffies: Jiffies) {
        let timeout = c_long::try_from(jiffies).unwrap_or(MAX_SCHEDULE_TIMEOUT);
        // SAFETY: By the type invariant the entry is in a queue, and it belongs to this task.
        unsafe { bindings::wait_woken(self.entry.get(), bindings::TASK_INTERRUPTIBLE, timeout) };
    }
}

#[pinned_drop]
impl PinnedDrop for Waiter {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the entry is in this queue.
        unsafe { bindings::remove_wait_queue(self.queue, self.entry.get()) };
    }
}
