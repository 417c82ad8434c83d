// SPDX-License-Identifier: GPL-2.0 OR MIT

//! One socket for several threads.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
};

use kvmi_abi::id::{VCPU_EVENT, VM_EVENT};
use rustix::net::{shutdown, Shutdown};

use crate::{
    connection::{Connection, MAX_WAITING_EVENTS},
    decoder::Message,
    error::{Error, ProtocolError, Result},
    io::{send_all, Deadline},
    link::{Incoming, Link},
};

/// Makes connections that share one socket; see [`Connection::share`].
#[derive(Debug)]
pub struct Hub<S: AsFd>(Arc<Users<S>>);

impl<S: AsFd> Clone for Hub<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S: AsFd> Hub<S> {
    /// Makes a connection that gets the replies to its own commands, and no events.
    pub fn connection(&self) -> Connection<S> {
        Connection::on(Link::Shared(Share::new(&self.0)))
    }
}

impl<S: AsFd + Send + Sync + 'static> Connection<S> {
    /// Lets several threads use the socket, each with a connection of its own from the hub. A
    /// command in one of them waits for no reply in another, and one that fails, or is not replied
    /// to in time, leaves the others usable.
    ///
    /// This connection gets all events, those that have arrived already included. Once it is
    /// dropped, the next event that has to be replied to breaks the connection for all. So does
    /// anything that breaks the protocol, and [`Self::hang_up`]. The socket is closed when the last
    /// connection and the hub are gone.
    ///
    /// A thread of the client's own receives from the socket from now on.
    pub fn share(mut self) -> Result<(Self, Hub<S>)> {
        let (stream, incoming, seq) = match self.link {
            Link::Own {
                stream,
                incoming,
                seq,
            } => (stream, incoming, seq),
            Link::Shared(share) => {
                let hub = Hub(share.users.clone());
                self.link = Link::Shared(share);
                return Ok((self, hub));
            }
        };
        let socket = Arc::new(Socket {
            stream,
            sending: Mutex::new(()),
            routes: Mutex::new(Routes {
                seq,
                ..Routes::default()
            }),
        });
        let users = Arc::new(Users(socket.clone()));
        let share = Share::new(&users);
        socket.routes().events = Arc::downgrade(&share.mailbox);
        thread::Builder::new()
            .name("kvmi receiver".to_owned())
            .spawn(move || socket.distribute(incoming))
            .map_err(Error::Io)?;
        self.link = Link::Shared(share);
        Ok((self, Hub(users)))
    }
}

/// All who use a socket: when the last one is gone it is shut down, which ends its receiver.
#[derive(Debug)]
struct Users<S: AsFd>(Arc<Socket<S>>);

impl<S: AsFd> Drop for Users<S> {
    fn drop(&mut self) {
        self.0.hang_up();
    }
}

/// A part of what is sent to and received from a socket.
#[derive(Debug)]
pub(crate) struct Share<S: AsFd> {
    users: Arc<Users<S>>,
    mailbox: Arc<Mailbox>,
}

impl<S: AsFd> Share<S> {
    fn new(users: &Arc<Users<S>>) -> Self {
        let mailbox = Arc::new(Mailbox::default());
        let mut routes = users.0.routes();
        routes.mailboxes.retain(|other| other.strong_count() != 0);
        routes.mailboxes.push(Arc::downgrade(&mailbox));
        if let Some(end) = routes.end {
            mailbox.close(end);
        }
        drop(routes);
        Self {
            users: users.clone(),
            mailbox,
        }
    }

    pub(crate) fn stream(&self) -> &S {
        &self.users.0.stream
    }

    pub(crate) fn hang_up(&self) {
        self.users.0.hang_up();
    }

    /// Numbers a command, the reply to which is for this share.
    pub(crate) fn number(&self) -> u32 {
        let mut routes = self.users.0.routes();
        routes.seq = routes.seq.wrapping_add(1);
        let seq = routes.seq;
        routes.waiting.insert(seq, self.mailbox.clone());
        seq
    }

    /// Sends whole messages, none of another share in between.
    pub(crate) fn send(&self, bytes: &[u8], deadline: Deadline) -> Result<()> {
        let socket = &self.users.0;
        let _turn = lock(&socket.sending);
        let sent = send_all(&socket.stream, bytes, deadline);
        // A part may have been sent, which makes nonsense of what anybody sends next.
        sent.inspect_err(|_| socket.hang_up())
    }

    pub(crate) fn receive(&self, deadline: Deadline) -> Result<Message> {
        self.mailbox.take(deadline)
    }

    pub(crate) fn try_receive(&self) -> Result<Option<Message>> {
        self.mailbox.try_take()
    }
}

/// A socket, and who waits for what from it.
#[derive(Debug)]
struct Socket<S> {
    stream: S,
    /// Held by who sends.
    sending: Mutex<()>,
    routes: Mutex<Routes>,
}

/// Where received messages go.
#[derive(Debug, Default)]
struct Routes {
    /// Number of the last command.
    seq: u32,
    /// Who waits for the reply to a command.
    waiting: HashMap<u32, Arc<Mailbox>>,
    events: Weak<Mailbox>,
    /// All of them.
    mailboxes: Vec<Weak<Mailbox>>,
    /// Nobody wants to hear any more; what has arrived before is no violation of anything.
    hung_up: bool,
    /// Why nothing is received any more.
    end: Option<End>,
}

impl<S: AsFd> Socket<S> {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        lock(&self.routes)
    }

    fn hang_up(&self) {
        self.routes().hung_up = true;
        // It fails if the other side has hung up, which is just as well.
        let _ = shutdown(&self.stream, Shutdown::Both);
    }

    /// Receives until the socket is shut down, and gives everything to whom it is for.
    fn distribute(&self, mut incoming: Incoming) {
        let end = loop {
            let message = incoming.receive(&self.stream, Deadline::after(None));
            match message.and_then(|message| Ok(self.routes().deliver(message)?)) {
                Ok(()) => {}
                Err(Error::Protocol(error)) => break End::Violated(error),
                Err(_) => break End::Closed,
            }
        };
        self.hang_up();
        let mut routes = self.routes();
        routes.end = Some(end);
        routes.waiting.clear();
        for mailbox in routes.mailboxes.iter().filter_map(Weak::upgrade) {
            mailbox.close(end);
        }
    }
}

impl Routes {
    fn deliver(&mut self, message: Message) -> std::result::Result<(), ProtocolError> {
        let (id, seq) = (message.header.id, message.header.seq);
        let to = match id {
            VM_EVENT | VCPU_EVENT => self.events.upgrade(),
            _ => self.waiting.remove(&seq),
        };
        match to {
            Some(mailbox) if mailbox.put(message) => Ok(()),
            Some(_) => Err(ProtocolError::TooManyEvents),
            // Nobody listens to what needs no reply.
            None if id == VM_EVENT || self.hung_up => Ok(()),
            None => Err(ProtocolError::UnexpectedMessage { id, seq }),
        }
    }
}

/// Why nothing is received any more.
#[derive(Clone, Copy, Debug)]
enum End {
    Closed,
    Violated(ProtocolError),
}

impl From<End> for Error {
    fn from(end: End) -> Self {
        match end {
            End::Closed => Self::Closed,
            End::Violated(error) => error.into(),
        }
    }
}

/// Messages for one share.
#[derive(Debug, Default)]
struct Mailbox {
    letters: Mutex<Letters>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Letters {
    messages: VecDeque<Message>,
    end: Option<End>,
}

impl Mailbox {
    /// Adds a message; returns whether there was room for it.
    fn put(&self, message: Message) -> bool {
        let mut letters = lock(&self.letters);
        if letters.messages.len() >= MAX_WAITING_EVENTS {
            return false;
        }
        letters.messages.push_back(message);
        self.changed.notify_one();
        true
    }

    /// Nothing more will come.
    fn close(&self, end: End) {
        lock(&self.letters).end = Some(end);
        self.changed.notify_all();
    }

    fn try_take(&self) -> Result<Option<Message>> {
        lock(&self.letters).take()
    }

    fn take(&self, deadline: Deadline) -> Result<Message> {
        let mut letters = lock(&self.letters);
        loop {
            if let Some(message) = letters.take()? {
                return Ok(message);
            }
            let Some(left) = deadline.left() else {
                let woken = self.changed.wait(letters);
                letters = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            if left.is_zero() {
                return Err(Error::Timeout);
            }
            let woken = self.changed.wait_timeout(letters, left);
            letters = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Letters {
    fn take(&mut self) -> Result<Option<Message>> {
        match (self.messages.pop_front(), self.end) {
            (Some(message), _) => Ok(Some(message)),
            (None, Some(end)) => Err(end.into()),
            (None, None) => Ok(None),
        }
    }
}

/// Whoever panicked with the lock left nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
