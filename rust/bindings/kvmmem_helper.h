/* SPDX-License-Identifier: GPL-2.0 */
/* Everything that `bindgen` turns into Rust for kvmmem. */

#include <linux/anon_inodes.h>
#include "kvmmem_shim.h"
