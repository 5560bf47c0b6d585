//! The number of cores of an adapter. No API reports it, so names of common GPUs are looked up in a table.

use std::fmt;

use wgpu::DeviceType;

/// Where [`Capabilities::cores`](super::Capabilities::cores) comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CoresFrom {
    /// [`GpuOptions::cores`](super::GpuOptions::cores).
    Options,
    /// The adapter's name is known.
    Name,
    /// The type of the adapter: 60 for discrete GPUs, 12 for integrated, 20 for virtual and other, and 2 for software adapters, so that
    /// software adapters choose the same kernels on every machine.
    DeviceType,
}

impl fmt::Display for CoresFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Options => "as asked for",
            Self::Name => "known by name",
            Self::DeviceType => "guessed from the type of the adapter",
        })
    }
}

/// Words of a name in lower case, and the number of cores. The first entry counts whose words all occur in the adapter's name as whole words,
/// so longer names come before shorter ones.
const KNOWN: &[(&str, usize)] = &[
    // NVIDIA: streaming multiprocessors. Data center.
    ("b200", 148),
    ("gh200", 132),
    ("h200", 132),
    ("h100 pcie", 114),
    ("h100", 132),
    ("h800", 132),
    ("a100", 108),
    ("a800", 108),
    ("a40", 84),
    ("a30", 56),
    ("a10g", 80),
    ("a10", 72),
    ("a16", 10),
    ("a2", 10),
    ("l40s", 142),
    ("l40", 142),
    ("l4", 58),
    ("v100", 80),
    ("t4", 40),
    ("p100", 56),
    // Workstations.
    ("rtx 6000 ada", 142),
    ("rtx 5000 ada", 100),
    ("rtx 4500 ada", 60),
    ("rtx 4000 ada", 48),
    ("rtx 2000 ada", 22),
    ("rtx a6000", 84),
    ("rtx a5500", 80),
    ("rtx a5000", 64),
    ("rtx a4500", 56),
    ("rtx a4000", 48),
    ("rtx a2000", 26),
    // GeForce.
    ("rtx 5090 laptop", 82),
    ("rtx 5080 laptop", 60),
    ("rtx 5070 ti laptop", 46),
    ("rtx 5070 laptop", 36),
    ("rtx 5060 laptop", 26),
    ("rtx 5050 laptop", 20),
    ("rtx 5090", 170),
    ("rtx 5080", 84),
    ("rtx 5070 ti", 70),
    ("rtx 5070", 48),
    ("rtx 5060 ti", 36),
    ("rtx 5060", 30),
    ("rtx 5050", 20),
    ("rtx 4090 laptop", 76),
    ("rtx 4080 laptop", 58),
    ("rtx 4070 laptop", 36),
    ("rtx 4060 laptop", 24),
    ("rtx 4050 laptop", 20),
    ("rtx 4090", 128),
    ("rtx 4080 super", 80),
    ("rtx 4080", 76),
    ("rtx 4070 ti super", 66),
    ("rtx 4070 ti", 60),
    ("rtx 4070 super", 56),
    ("rtx 4070", 46),
    ("rtx 4060 ti", 34),
    ("rtx 4060", 24),
    ("rtx 3080 ti laptop", 58),
    ("rtx 3080 laptop", 48),
    ("rtx 3070 ti laptop", 46),
    ("rtx 3070 laptop", 40),
    ("rtx 3060 laptop", 30),
    ("rtx 3050 ti laptop", 20),
    ("rtx 3050 laptop", 16),
    ("rtx 3090 ti", 84),
    ("rtx 3090", 82),
    ("rtx 3080 ti", 80),
    ("rtx 3080", 68),
    ("rtx 3070 ti", 48),
    ("rtx 3070", 46),
    ("rtx 3060 ti", 38),
    ("rtx 3060", 28),
    ("rtx 3050", 20),
    ("rtx 2080 ti", 68),
    ("rtx 2080 super", 48),
    ("rtx 2080", 46),
    ("rtx 2070 super", 40),
    ("rtx 2070", 36),
    ("rtx 2060 super", 34),
    ("rtx 2060", 30),
    ("gtx 1660", 22),
    ("gtx 1650", 14),
    // AMD: compute units.
    ("mi300x", 304),
    ("mi300a", 228),
    ("mi250x", 220),
    ("mi210", 104),
    ("mi100", 120),
    ("rx 9070 xt", 64),
    ("rx 9070 gre", 48),
    ("rx 9070", 56),
    ("rx 9060 xt", 32),
    ("rx 9060", 28),
    ("rx 7900 xtx", 96),
    ("rx 7900 xt", 84),
    ("rx 7900 gre", 80),
    ("rx 7900m", 72),
    ("rx 7800 xt", 60),
    ("rx 7700 xt", 54),
    ("rx 7600 xt", 32),
    ("rx 7600", 32),
    ("rx 6950 xt", 80),
    ("rx 6900 xt", 80),
    ("rx 6800 xt", 72),
    ("rx 6800", 60),
    ("rx 6750 xt", 40),
    ("rx 6700 xt", 40),
    ("rx 6700", 36),
    ("rx 6650 xt", 32),
    ("rx 6600 xt", 32),
    ("rx 6600", 28),
    ("rx 6500 xt", 16),
    ("rx 6400", 12),
    ("radeon 8060s", 40),
    ("radeon 8050s", 32),
    ("radeon 890m", 16),
    ("radeon 880m", 12),
    ("radeon 780m", 12),
    ("radeon 760m", 8),
    ("radeon 740m", 4),
    ("radeon 680m", 12),
    ("radeon 660m", 6),
    // Apple: GPU cores, of the largest version sold.
    ("apple m1 ultra", 64),
    ("apple m1 max", 32),
    ("apple m1 pro", 16),
    ("apple m1", 8),
    ("apple m2 ultra", 76),
    ("apple m2 max", 38),
    ("apple m2 pro", 19),
    ("apple m2", 10),
    ("apple m3 ultra", 80),
    ("apple m3 max", 40),
    ("apple m3 pro", 18),
    ("apple m3", 10),
    ("apple m4 max", 40),
    ("apple m4 pro", 20),
    ("apple m4", 10),
    // Intel: Xe cores, or 16 execution units.
    ("arc b580", 20),
    ("arc b570", 18),
    ("arc a770", 32),
    ("arc a750", 28),
    ("arc a580", 24),
    ("arc a380", 8),
    ("arc a310", 6),
    ("arc a770m", 32),
    ("arc a730m", 24),
    ("arc a550m", 16),
    ("arc a370m", 8),
    ("arc a350m", 6),
    ("arc 140v", 8),
    ("arc 130v", 7),
    ("arc 140t", 8),
    ("iris xe", 6),
    ("iris plus", 4),
    ("uhd graphics 770", 2),
    ("uhd graphics", 2),
];

/// The number of cores of an adapter. `asked` takes precedence.
pub(super) fn of(name: &str, device_type: DeviceType, asked: Option<usize>) -> (usize, CoresFrom) {
    if let Some(asked) = asked {
        return (asked.max(1), CoresFrom::Options);
    }
    if let Some(known) = known(name) {
        return (known, CoresFrom::Name);
    }
    let guessed = match device_type {
        DeviceType::DiscreteGpu => 60,
        DeviceType::IntegratedGpu => 12,
        DeviceType::VirtualGpu | DeviceType::Other => 20,
        DeviceType::Cpu => 2,
    };
    (guessed, CoresFrom::DeviceType)
}

fn known(name: &str) -> Option<usize> {
    let name = name.to_lowercase();
    let words: Vec<&str> = name
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    let has = |part: &str| part.split(' ').all(|word| words.contains(&word));
    let (_, cores) = KNOWN.iter().find(|(part, _)| has(part))?;
    Some(*cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_drivers_report_them() {
        let names = [
            ("NVIDIA H100 80GB HBM3", 132),
            ("NVIDIA H200", 132),
            ("NVIDIA H100 PCIe", 114),
            ("NVIDIA A100-SXM4-80GB", 108),
            ("NVIDIA L4", 58),
            ("Tesla T4", 40),
            ("NVIDIA GeForce RTX 4090", 128),
            ("NVIDIA GeForce RTX 4060 Laptop GPU", 24),
            ("NVIDIA GeForce RTX 3050 Laptop GPU", 16),
            ("NVIDIA GeForce RTX 4070 Ti SUPER", 66),
            ("NVIDIA RTX 6000 Ada Generation", 142),
            ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 96),
            ("AMD Radeon RX 6800", 60),
            ("AMD Radeon 780M Graphics (RADV PHOENIX)", 12),
            ("Apple M1", 8),
            ("Apple M3 Max", 40),
            ("Intel(R) Arc(TM) A770 Graphics (DG2)", 32),
            ("Intel(R) Iris(R) Xe Graphics (TGL GT2)", 6),
        ];
        for (name, cores) in names {
            let found = of(name, DeviceType::DiscreteGpu, None);
            assert_eq!(found, (cores, CoresFrom::Name), "{name}");
        }
    }

    /// An entry that comes after a part of itself would never be found.
    #[test]
    fn every_entry_is_found() {
        for (name, cores) in KNOWN {
            assert_eq!(known(name), Some(*cores), "{name}");
        }
    }

    #[test]
    fn unknown_names_are_guessed_by_type_and_options_decide() {
        let guess = |device_type| of("Imaginary 9000", device_type, None);
        assert_eq!(guess(DeviceType::DiscreteGpu), (60, CoresFrom::DeviceType));
        assert_eq!(guess(DeviceType::IntegratedGpu).0, 12);
        assert_eq!(guess(DeviceType::Cpu).0, 2);
        let asked = |cores| of("NVIDIA H100", DeviceType::DiscreteGpu, Some(cores));
        assert_eq!(asked(7), (7, CoresFrom::Options));
        assert_eq!(asked(0).0, 1);
    }
}
