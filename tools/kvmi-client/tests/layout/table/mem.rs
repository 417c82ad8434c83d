// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The interface of `/dev/kvmmem`.

use kvmi_client::abi::mem::{
    MemMap, MemMapMany, MemUnmapMany, MAX_AREA_PAGES, MAX_MAP_PAGES, MEM_MAP, MEM_MAP_MANY,
    MEM_UNMAP, MEM_UNMAP_MANY,
};

use super::Struct;

/// All structures.
pub fn structs() -> Vec<Struct> {
    vec![
        describe!("struct kvmi_mem_map", MemMap { token, gpa, gva }),
        describe!(
            "struct kvmi_mem_map_many",
            MemMapMany {
                token,
                gva,
                gpas,
                count,
                padding
            }
        ),
        describe!(
            "struct kvmi_mem_unmap_many",
            MemUnmapMany {
                gva,
                count,
                padding
            }
        ),
    ]
}

/// All numbers.
pub fn constants() -> [(&'static str, i64); 6] {
    [
        ("KVM_INTRO_MEM_MAP", MEM_MAP.into()),
        ("KVM_INTRO_MEM_UNMAP", MEM_UNMAP.into()),
        ("KVM_INTRO_MEM_MAP_MANY", MEM_MAP_MANY.into()),
        ("KVM_INTRO_MEM_UNMAP_MANY", MEM_UNMAP_MANY.into()),
        ("KVM_INTRO_MAX_MAP_PAGES", MAX_MAP_PAGES.into()),
        ("KVM_INTRO_MAX_AREA_PAGES", MAX_AREA_PAGES as i64),
    ]
}
