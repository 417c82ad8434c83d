// SPDX-License-Identifier: GPL-2.0

//! Sockets handed over by user space.
//!
//! C header: [`include/linux/net.h`](srctree/include/linux/net.h)

use core::ptr::NonNull;
use kernel::{
    bindings,
    ffi::c_int,
    prelude::*, //
};

/// How long a transmission may take.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Until there is room, the socket is shut down or a signal arrives.
    ForRoom,
    /// Not at all.
    Never,
}

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

    /// Sends the concatenation of `parts`.
    ///
    /// Two transmissions at the same time may mix: callers exclude each other. Fails with `EINTR`
    /// if a signal came before anything was sent; after any other error an unknown part was sent.
    pub fn send<const N: usize>(&self, parts: [&[u8]; N], wait: Wait) -> Result {
        let mut msg = bindings::msghdr::default();
        let len = parts.iter().map(|part| part.len()).sum::<usize>();
        let mut vec = parts.map(|part| bindings::kvec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: part.len(),
        });
        msg.msg_flags = bindings::MSG_NOSIGNAL;
        if wait == Wait::Never {
            msg.msg_flags |= bindings::MSG_DONTWAIT;
        }

        // SAFETY: `sock` is valid by the type invariant; sending only reads from what `vec`
        // describes, which lives longer than this call.
        let ret = unsafe {
            bindings::kernel_sendmsg(self.sock.as_ptr(), &mut msg, vec.as_mut_ptr(), N, len)
        };
        match usize::try_from(ret) {
            Ok(n) if n == len => Ok(()),
            Ok(_) => Err(EPIPE),
            Err(_) => match Error::from_errno(ret) {
                e if e == ERESTARTSYS => Err(EINTR),
                e => Err(e),
            },
        }
    }

    /// Whether the peer has closed the connection, or it is shut down; also while there is
    /// something left to be received.
    pub fn peer_has_hung_up(&self) -> bool {
        const EPOLLERR: u32 = 0x8;
        const EPOLLHUP: u32 = 0x10;
        const EPOLLRDHUP: u32 = 0x2000;

        // SAFETY: `sock` is valid by the type invariant; the file of a socket never changes.
        let file = unsafe { (*self.sock.as_ptr()).file };
        // SAFETY: As above; the operations may be replaced (IPV6_ADDRFORM), by valid ones.
        let ops = unsafe { (&raw const (*self.sock.as_ptr()).ops).read_volatile() };
        // SAFETY: The operations of a valid socket are valid.
        let Some(poll) = (unsafe { (*ops).poll }) else {
            return false;
        };
        // SAFETY: Both are valid as long as `self`; without a table nobody is put on a queue.
        let mask = unsafe { poll(file, self.sock.as_ptr(), core::ptr::null_mut()) };
        mask & (EPOLLERR | EPOLLHUP | EPOLLRDHUP) != 0
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
