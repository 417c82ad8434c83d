// SPDX-License-Identifier: GPL-2.0

//! Sockets handed over by user space.
//!
//! C header: [`include/linux/net.h`](srctree/include/linux/net.h)

use core::ptr::{
    self,
    NonNull, //
};
use kernel::{
    bindings,
    current,
    ffi::c_int,
    prelude::*,
    sync::barrier::smp_mb,
    time::{
        msecs_to_jiffies,
        Jiffies, //
    }, //
};
use pin_init::stack_pin_init;

use crate::wait::Waiter;

const EPOLLERR: u32 = 0x8;
const EPOLLHUP: u32 = 0x10;
const EPOLLRDHUP: u32 = 0x2000;

/// How often a sender that waits for room tries again at least, in milliseconds.
const MEMORY_CHECK_MS: u32 = 1000;

/// A connected stream socket, taken from a file descriptor of the current process.
///
/// # Invariants
///
/// `sock` is valid and this value owns one reference to its file.
pub struct StreamSocket {
    sock: NonNull<bindings::socket>,
}

// SAFETY: The last reference to a file may be put from any thread.
unsafe impl Send for StreamSocket {}
// SAFETY: `struct socket` does its own locking.
unsafe impl Sync for StreamSocket {}

impl StreamSocket {
    /// Takes a reference to the socket behind `fd`.
    ///
    /// Fails with `EINVAL` if it is not a connected stream socket.
    pub fn from_fd(fd: i32) -> Result<Self> {
        let mut err = 0;
        // SAFETY: `err` is valid for writing.
        let sock = unsafe { bindings::sockfd_lookup(fd, &mut err) };

        // INVARIANT: On success `sockfd_lookup()` took a reference to the file.
        let socket = Self {
            sock: NonNull::new(sock).ok_or(EINVAL)?,
        };
        if socket.is_connected_stream() {
            Ok(socket)
        } else {
            Err(EINVAL)
        }
    }

    fn is_connected_stream(&self) -> bool {
        // SAFETY: `sock` is valid by the type invariant; the type never changes.
        let ty = unsafe { (*self.sock.as_ptr()).type_ };
        let mut peer = bindings::__kernel_sockaddr_storage::default();
        // Not every family keeps `socket::state` up to date, but all know their peer.
        //
        // SAFETY: `sock` is valid by the type invariant, and there is room for any address.
        let ret =
            unsafe { bindings::kernel_getpeername(self.sock.as_ptr(), (&raw mut peer).cast()) };

        u32::try_from(ty) == Ok(bindings::sock_type_SOCK_STREAM) && ret >= 0
    }

    /// Receives into `buf` with these `MSG_*` flags; returns how much, 0 at the end of the stream.
    /// Ancillary data is dropped.
    fn recv(&self, buf: &mut [u8], flags: u32) -> Result<usize> {
        let mut msg = bindings::msghdr::default();
        let len = buf.len();
        let mut vec = bindings::kvec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: len,
        };
        // SAFETY: `sock` is valid by the type invariant; `vec` describes memory that is
        // exclusively ours for the duration of the call.
        let ret = unsafe {
            bindings::kernel_recvmsg(
                self.sock.as_ptr(),
                &mut msg,
                &mut vec,
                1,
                len,
                flags as c_int,
            )
        };
        usize::try_from(ret).map_err(|_| Error::from_errno(ret))
    }

    /// Receives exactly `buf.len()` bytes.
    ///
    /// Returns `false` if the stream ends before the first of them. Sleeps until they are there,
    /// the socket is shut down or a signal arrives; fails with `EPIPE` if the stream ends in the
    /// middle.
    pub fn recv_exact(&self, buf: &mut [u8]) -> Result<bool> {
        let mut done = 0;

        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.recv(rest, bindings::MSG_WAITALL)? {
                0 if done == 0 => return Ok(false),
                0 => return Err(EPIPE),
                n => done += n,
            }
        }
        Ok(true)
    }

    /// Receives something into `buf`, without waiting; gives `false` if there is nothing.
    pub fn recv_now(&self, buf: &mut [u8]) -> bool {
        self.recv(buf, bindings::MSG_DONTWAIT).is_ok_and(|n| n > 0)
    }

    /// Sends as much of the concatenation of `parts` as there is room for, without waiting;
    /// returns how many bytes that was, or `EAGAIN` if there is no room at all.
    fn send_now<const N: usize>(&self, parts: &[&[u8]; N]) -> Result<usize> {
        let mut msg = bindings::msghdr::default();
        let len = total_len(parts);
        let mut vec = parts.map(|part| bindings::kvec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: part.len(),
        });
        msg.msg_flags = bindings::MSG_NOSIGNAL | bindings::MSG_DONTWAIT;

        // SAFETY: `sock` is valid by the type invariant; sending only reads from what `vec`
        // describes, which lives longer than this call.
        let ret = unsafe {
            bindings::kernel_sendmsg(self.sock.as_ptr(), &mut msg, vec.as_mut_ptr(), N, len)
        };
        usize::try_from(ret).map_err(|_| Error::from_errno(ret))
    }

    /// Sends as much of `parts` as there is room for, and takes that out of them. Gives `true` if
    /// that was all.
    fn push<const N: usize>(&self, parts: &mut [&[u8]; N]) -> Result<bool> {
        while total_len(parts) > 0 {
            match self.send_now(parts) {
                Ok(sent) => advance(parts, sent),
                Err(e) if e == EAGAIN => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// Sends the concatenation of `parts`. Upon a failure, `parts` is what was not sent.
    ///
    /// Sleeps while there is no room. Fails with `ETIMEDOUT` when `left` says 0, which is asked
    /// before it sleeps and after each [`Self::wake`], and with `EINTR` when a signal is pending.
    ///
    /// Two transmissions at the same time may mix: callers exclude each other.
    pub fn send<const N: usize>(
        &self,
        parts: &mut [&[u8]; N],
        left: &dyn Fn() -> Jiffies,
    ) -> Result {
        if self.push(parts)? {
            return Ok(());
        }
        // SAFETY: `sock` is valid by the type invariant.
        let queue = unsafe { &raw mut (*self.sock.as_ptr()).wq.wait };
        // SAFETY: The queue is part of the socket, and so as valid as `self`.
        stack_pin_init!(let waiter = unsafe { Waiter::new(queue) });
        // Who makes room looks for waiters then, or this sees the room.
        smp_mb();
        while !self.push(parts)? {
            let left = left();
            if left == 0 {
                return Err(ETIMEDOUT);
            }
            if current!().signal_pending() {
                return Err(EINTR);
            }
            // If what lacks is memory, nobody tells when there is some.
            waiter.wait(left.min(msecs_to_jiffies(MEMORY_CHECK_MS)));
        }
        Ok(())
    }

    /// Has those who sleep in [`Self::send`] look at the time that they have left.
    pub fn wake(&self) {
        // SAFETY: `sock` is valid by the type invariant.
        let queue = unsafe { &raw mut (*self.sock.as_ptr()).wq.wait };
        // SAFETY: As above; spurious wake-ups are harmless to everybody who waits for a socket.
        unsafe { bindings::__wake_up(queue, bindings::TASK_INTERRUPTIBLE, 0, ptr::null_mut()) };
    }

    /// Whether the peer has closed the connection, or it is shut down; also while there is
    /// something left to be received.
    pub fn peer_has_hung_up(&self) -> bool {
        self.poll() & (EPOLLERR | EPOLLHUP | EPOLLRDHUP) != 0
    }

    /// Returns what `poll(2)` would.
    fn poll(&self) -> u32 {
        // SAFETY: `sock` is valid by the type invariant; the file of a socket never changes.
        let file = unsafe { (*self.sock.as_ptr()).file };
        // SAFETY: As above; the operations may be replaced (IPV6_ADDRFORM), by valid ones.
        let ops = unsafe { (&raw const (*self.sock.as_ptr()).ops).read_volatile() };
        // SAFETY: The operations of a valid socket are valid.
        let Some(poll) = (unsafe { (*ops).poll }) else {
            return 0;
        };
        // SAFETY: Both are valid as long as `self`; without a table nobody is put on a queue.
        unsafe { poll(file, self.sock.as_ptr(), ptr::null_mut()) }
    }

    /// Makes pending and future receptions and transmissions end, here and at the peer.
    pub fn shutdown(&self) {
        // Fails only if the peer has closed the connection already, which is as good.
        //
        // SAFETY: `sock` is valid by the type invariant.
        unsafe {
            bindings::kernel_sock_shutdown(
                self.sock.as_ptr(),
                bindings::sock_shutdown_cmd_SHUT_RDWR,
            )
        };
    }
}

impl Drop for StreamSocket {
    fn drop(&mut self) {
        // SAFETY: `sock` is valid by the type invariant; the file of a socket never changes.
        let file = unsafe { (*self.sock.as_ptr()).file };
        // SAFETY: By the type invariant we own a reference to the file.
        unsafe { bindings::fput(file) };
    }
}

/// Returns how many bytes `parts` have.
pub fn total_len(parts: &[&[u8]]) -> usize {
    parts.iter().map(|part| part.len()).sum()
}

/// Takes the first `n` bytes out of `parts`.
fn advance(parts: &mut [&[u8]], mut n: usize) {
    for part in parts {
        let (_, rest) = part.split_at(n.min(part.len()));
        n -= part.len() - rest.len();
        *part = rest;
    }
}
