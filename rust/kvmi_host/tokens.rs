// SPDX-License-Identifier: GPL-2.0

//! The tokens that a session has issued, and their end.

use kernel::{
    impl_has_hr_timer,
    new_mutex,
    new_spinlock,
    prelude::*,
    sync::{
        Arc,
        ArcBorrow,
        Mutex,
        SpinLock, //
    },
    time::{
        hrtimer::{
            ArcHrTimerHandle,
            HrTimer,
            HrTimerCallback,
            HrTimerCallbackContext,
            HrTimerPointer,
            HrTimerRestart,
            RelativeMode, //
        },
        Delta,
        Instant,
        Monotonic, //
    }, //
};
use kvmi_abi::{
    token::{
        MapToken,
        Presented,
        TokenTable, //
    },
    KvmiError, //
};
use kvmi_common::random;

/// When the timer comes again that has found the table in use.
const IN_USE_NS: u64 = 1_000_000;

/// The tokens of a session. A timer ends what nobody uses, and runs only while there are some.
#[pin_data]
pub(crate) struct Tokens {
    /// The timer's handler, which may interrupt whoever holds this, only tries to take it.
    #[pin]
    table: SpinLock<TokenTable>,
    /// Where time begins.
    epoch: Instant<Monotonic>,
    #[pin]
    timer: HrTimer<Self>,
    /// Keeps these tokens alive as long as the timer may run, see [`Self::close`].
    #[pin]
    armed: Mutex<Option<ArcHrTimerHandle<Self>>>,
}

impl Tokens {
    /// Creates an empty set.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                table <- new_spinlock!(TokenTable::new(), "Tokens::table"),
                epoch: Instant::now(),
                timer <- HrTimer::new(),
                armed <- new_mutex!(None, "Tokens::armed"),
            }),
            GFP_KERNEL,
        )
    }

    /// On the clock of the table.
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(0)
    }

    /// Issues a token. Fails with `Again` if there are too many, or no randomness. May sleep.
    pub(crate) fn issue(self: &Arc<Self>, writable: bool) -> Result<MapToken, KvmiError> {
        let mut token = MapToken::default();
        random::fill(&mut token.bytes).map_err(|_| KvmiError::Again)?;

        let mut armed = self.armed.lock();
        let now = self.now();
        let mut table = self.table.lock();
        table.issue(token, writable, now)?;
        let next = table.expire(now);
        drop(table);
        // Dropping a handle stops the timer, whoever has started it: in this order.
        *armed = None;
        *armed = next.map(|at| self.clone().start(delta(at.saturating_sub(now))));
        Ok(token)
    }

    /// Finds the token that somebody has presented.
    pub(crate) fn present(self: &Arc<Self>, token: &MapToken) -> Option<InUse> {
        let presented = self.table.lock().present(token, self.now())?;
        Some(InUse {
            writable: presented.writable,
            presented: Some(presented),
            tokens: self.clone(),
        })
    }

    /// Ends all tokens for good, and the timer: when this returns it does not run any more.
    pub(crate) fn close(&self) {
        let mut armed = self.armed.lock();
        self.table.lock().close();
        *armed = None;
    }
}

fn delta(ns: u64) -> Delta {
    Delta::from_nanos(i64::try_from(ns).unwrap_or(i64::MAX))
}

impl HrTimerCallback for Tokens {
    type Pointer<'a> = Arc<Self>;

    fn run(this: ArcBorrow<'_, Self>, mut ctx: HrTimerCallbackContext<'_, Self>) -> HrTimerRestart {
        let now = this.now();
        let next = match this.table.try_lock() {
            Some(mut table) => table.expire(now),
            None => Some(now + IN_USE_NS),
        };
        match next {
            Some(at) => {
                ctx.forward_now(delta(at.saturating_sub(now)));
                HrTimerRestart::Restart
            }
            None => HrTimerRestart::NoRestart,
        }
    }
}

impl_has_hr_timer! {
    impl HasHrTimer<Self> for Tokens {
        mode: RelativeMode<Monotonic>, field: self.timer
    }
}

/// A token that is being used. Dropped, it is valid again for what is left of its time.
pub(crate) struct InUse {
    tokens: Arc<Tokens>,
    presented: Option<Presented>,
    /// Whether pages may be written to.
    pub(crate) writable: bool,
}

impl InUse {
    /// Whether its session still serves a tool.
    pub(crate) fn is_in_force(&self) -> bool {
        !self.tokens.table.lock().is_closed()
    }

    /// Ends the token: it has served its purpose.
    pub(crate) fn consume(mut self) {
        if let Some(presented) = self.presented.take() {
            self.tokens.table.lock().consume(presented);
        }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(presented) = self.presented.take() {
            let now = self.tokens.now();
            self.tokens.table.lock().take_back(presented, now);
        }
    }
}
