/* SPDX-License-Identifier: GPL-2.0 */
/* Everything that `bindgen` turns into Rust for this project's modules. */

/* Defines struct module, so that the kernel's binding of it is the only one. */
#include <linux/module.h>
#include <linux/kvm_introspection.h>
#include <trace/events/kvmi.h>
