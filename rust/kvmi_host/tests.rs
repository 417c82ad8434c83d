// SPDX-License-Identifier: GPL-2.0

//! KUnit tests of what needs a kernel but no VM; they run when the module is loaded.

use kernel::prelude::*;

#[kunit_tests(kvmi_host)]
mod kvmi_host {
    use kernel::{
        new_condvar,
        new_mutex,
        prelude::*,
        sync::{
            Arc,
            CondVar,
            Mutex, //
        }, //
    };
    use kvmi_abi::{
        wire::Header,
        KvmiError,
        Policy,
        Reject,
        Request, //
    };
    use kvmi_common::{
        kthread::KThread,
        socket::StreamSocket, //
    };

    #[derive(PartialEq, Eq)]
    enum Stage {
        Created,
        Running,
        Ended,
    }

    /// What a thread under test and its creator share.
    #[pin_data]
    struct Progress {
        #[pin]
        stage: Mutex<Stage>,
        #[pin]
        changed: CondVar,
    }

    impl Progress {
        fn new() -> Result<Arc<Self>> {
            Arc::pin_init(
                pin_init!(Self {
                    stage <- new_mutex!(Stage::Created),
                    changed <- new_condvar!(),
                }),
                GFP_KERNEL,
            )
        }

        /// Runs on the thread: sleeps until it is killed.
        fn run(&self) {
            let mut stage = self.stage.lock();
            *stage = Stage::Running;
            self.changed.notify_all();
            while !self.changed.wait_interruptible(&mut stage) {}
            *stage = Stage::Ended;
        }

        fn wait_until_running(&self) {
            let mut stage = self.stage.lock();
            while *stage != Stage::Running {
                self.changed.wait(&mut stage);
            }
        }
    }

    #[test]
    fn dropping_a_thread_ends_its_sleep_and_waits_for_it() -> Result {
        let progress = Progress::new()?;
        let shared = progress.clone();
        let thread = KThread::run(c"kvmi-test", move || shared.run())?;

        progress.wait_until_running();
        drop(thread);
        assert!(*progress.stage.lock() == Stage::Ended);
        Ok(())
    }

    #[test]
    fn dropping_a_thread_that_may_not_have_run_yet_drops_its_closure() -> Result {
        for _ in 0..100 {
            let progress = Progress::new()?;
            let shared = progress.clone();
            drop(KThread::run(c"kvmi-test", move || shared.run())?);
            assert!(Arc::into_unique_or_drop(progress).is_some());
        }
        Ok(())
    }

    #[test]
    fn descriptor_that_does_not_exist_is_no_socket() {
        assert_eq!(StreamSocket::from_fd(-1).err(), Some(EINVAL));
    }

    #[test]
    fn protocol_rules_hold_in_the_kernel_too() {
        let header = Header {
            id: 0xffff,
            size: 0,
            seq: 1,
        };
        let result = Request::parse(&header, &[], &Policy::default());
        assert!(result == Err(Reject::Reply(KvmiError::NoSys)));
    }
}
