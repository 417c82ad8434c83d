// SPDX-License-Identifier: GPL-2.0
/* Defines the tracepoints, and what Rust calls to reach them. */
#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include <trace/events/kvmi.h>
