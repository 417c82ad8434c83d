// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory types by the MTRRs (Intel SDM volume 3, "Memory Type Range Registers"; AMD APM
//! volume 2, "Memory-Type Range Registers").

/// Uncacheable.
const UC: u8 = 0;
/// Write-through.
const WT: u8 = 4;
/// Write-back.
const WB: u8 = 6;

const MTRR_CAP: u32 = 0xfe;
const MTRR_PHYS_BASE0: u32 = 0x200;
const MTRR_FIX_64K_00000: u32 = 0x250;
const MTRR_FIX_16K_80000: u32 = 0x258;
const MTRR_FIX_4K_C0000: u32 = 0x268;
const MTRR_DEF_TYPE: u32 = 0x2ff;

const DEF_TYPE_ENABLED: u64 = 1 << 11;
const DEF_TYPE_FIXED_ENABLED: u64 = 1 << 10;
const MASK_VALID: u64 = 1 << 11;

/// Says of what type the memory at `gpa` is, by the MTRRs alone. `msr` reads an MSR.
pub fn memory_type<E>(gpa: u64, mut msr: impl FnMut(u32) -> Result<u64, E>) -> Result<u8, E> {
    let def_type = msr(MTRR_DEF_TYPE)?;
    if def_type & DEF_TYPE_ENABLED == 0 {
        return Ok(UC);
    }
    if def_type & DEF_TYPE_FIXED_ENABLED != 0 {
        if let Some((index, field)) = fixed_range(gpa) {
            return Ok(byte(msr(index)?, field));
        }
    }

    let count = u32::from(byte(msr(MTRR_CAP)?, 0));
    let mut found = None;
    for pair in 0..count {
        let base = msr(MTRR_PHYS_BASE0 + 2 * pair)?;
        let mask = msr(MTRR_PHYS_BASE0 + 2 * pair + 1)?;
        if mask & MASK_VALID == 0 {
            continue;
        }
        let mask = mask & !0xfff;
        if gpa & mask == base & mask {
            let here = byte(base, 0);
            found = Some(found.map_or(here, |other| overlap(other, here)));
        }
    }
    Ok(found.unwrap_or(byte(def_type, 0)))
}

/// Which of the fixed-range MTRRs, and which byte of it, is about `gpa`.
fn fixed_range(gpa: u64) -> Option<(u32, u32)> {
    let gpa = u32::try_from(gpa).ok()?;
    let (first, size, start) = match gpa {
        0..0x8_0000 => (MTRR_FIX_64K_00000, 0x1_0000, 0),
        0x8_0000..0xc_0000 => (MTRR_FIX_16K_80000, 0x4000, 0x8_0000),
        0xc_0000..0x10_0000 => (MTRR_FIX_4K_C0000, 0x1000, 0xc_0000),
        _ => return None,
    };
    let range = (gpa - start) / size;
    Some((first + range / 8, range % 8))
}

/// The type where variable ranges overlap. What the manuals leave undefined is uncacheable here.
fn overlap(a: u8, b: u8) -> u8 {
    match (a, b) {
        (a, b) if a == b => a,
        (WT, WB) | (WB, WT) => WT,
        _ => UC,
    }
}

fn byte(value: u64, index: u32) -> u8 {
    value
        .to_le_bytes()
        .get(index as usize)
        .copied()
        .unwrap_or(UC)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory types with these MSRs set and all others 0.
    fn types<const N: usize>(msrs: &[(u32, u64)], gpas: [u64; N]) -> [u8; N] {
        gpas.map(|gpa| {
            let read = |index| {
                let msr = msrs.iter().find(|(i, _)| *i == index);
                Ok::<_, ()>(msr.map_or(0, |(_, value)| *value))
            };
            memory_type(gpa, read).unwrap()
        })
    }

    #[test]
    fn everything_is_uncacheable_while_mtrrs_are_off() {
        assert_eq!(types(&[(0x2ff, 6)], [0, 0x10_0000]), [UC; 2]);
    }

    #[test]
    fn default_type_is_for_what_no_range_covers() {
        let msrs = [
            (0x2ff, 0x806),
            (0xfe, 8),
            (0x200, 0xe000_0000),
            (0x201, 0xf_e000_0800),
        ];
        assert_eq!(
            types(
                &msrs,
                [0, 0xdfff_ffff, 0xe000_0000, 0xffff_ffff, 0x1_0000_0000]
            ),
            [WB, WB, UC, UC, WB]
        );
    }

    #[test]
    fn fixed_ranges_go_before_variable_ones() {
        let msrs = [
            (0x2ff, 0xc06),
            (0x250, 0x0600_0000_0000_0005),
            (0x258, 0x0000_0000_0000_0400),
            (0x26f, 0x0400_0000_0000_0000),
        ];
        let gpas = [
            0xffff, 0x1_0000, 0x7_0000, 0x8_0000, 0x8_4000, 0xf_efff, 0xf_f000, 0x10_0000,
        ];
        assert_eq!(types(&msrs, gpas), [5, 0, 6, 0, 4, 0, 4, 6]);
    }

    #[test]
    fn where_ranges_overlap_the_weaker_type_wins() {
        let all = 0xf_ffff_0000_0800;
        let both = |a, b| {
            let msrs = [
                (0x2ff, 0x800),
                (0xfe, 2),
                (0x200, a),
                (0x201, all),
                (0x202, b),
                (0x203, all),
            ];
            types(&msrs, [0x1000])[0]
        };
        assert_eq!(both(6, 6), 6);
        assert_eq!(both(6, 4), 4);
        assert_eq!(both(6, 0), 0);
        assert_eq!(both(1, 6), 0);
    }
}
