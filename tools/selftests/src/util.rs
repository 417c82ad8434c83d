// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Waiting for a condition, and reproducible random numbers.

use std::{
    sync::OnceLock,
    thread::sleep,
    time::{Duration, Instant},
};

/// How much slower than usual this machine is.
static SLOWNESS: OnceLock<f64> = OnceLock::new();

/// Tells that this machine is slow, before anything waits.
pub fn set_slowness(factor: f64) {
    // Only the first one counts; limits that are too tight help nobody.
    let _ = SLOWNESS.set(factor.max(1.0));
}

/// A time that is longer on a slow machine.
pub fn scaled(limit: Duration) -> Duration {
    limit.mul_f64(*SLOWNESS.get_or_init(|| 1.0))
}

/// How long something may take that takes next to no time: generous, for emulated machines.
pub fn soon() -> Duration {
    scaled(Duration::from_secs(20))
}

/// How long an UNHOOK may take, whatever the tool does.
pub fn shortly() -> Duration {
    scaled(Duration::from_secs(2))
}

/// Skips the test if the host cannot swap.
pub fn expect_swap() {
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().count() < 2 {
        crate::harness::skip("the host has no swap");
    }
}

/// Waits until `condition` holds; fails the test if it does not within [`soon`].
#[track_caller]
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let limit = soon();
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "{what}: not so after {} s",
            limit.as_secs()
        );
        sleep(Duration::from_millis(2));
    }
}

/// Runs `action`; fails the test if it takes longer than 2 s (on a machine of the usual speed).
#[track_caller]
pub fn promptly<T>(what: &str, action: impl FnOnce() -> T) -> T {
    within(shortly(), what, action)
}

/// Runs `action`; fails the test if it takes longer than `limit`.
#[track_caller]
pub fn within<T>(limit: Duration, what: &str, action: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = action();
    let took = start.elapsed();
    assert!(took < limit, "{what} took {} ms", took.as_millis());
    result
}

/// A small generator of random numbers (splitmix64).
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator that always gives the same numbers for the same `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        // Lossless: the remainder is below `limit`.
        (self.next() % limit as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of `items`.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// `len` random bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// Lets a random time below `limit` pass, to hit a random moment of something else.
    pub fn pause(&mut self, limit: Duration) {
        sleep(limit.mul_f64(self.below(1 << 20) as f64 / f64::from(1 << 20)));
    }
}
