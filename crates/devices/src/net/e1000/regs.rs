//! Register addresses and bits. PCI/PCI-X Family of Gigabit Ethernet Controllers Software
//! Developer's Manual (8254x), chapter 13; names are the manual's.
#![allow(dead_code, reason = "fields of one register belong together")]

pub(super) const CTRL: u32 = 0x0000;
pub(super) const STATUS: u32 = 0x0008;
pub(super) const EECD: u32 = 0x0010;
pub(super) const EERD: u32 = 0x0014;
pub(super) const CTRL_EXT: u32 = 0x0018;
pub(super) const MDIC: u32 = 0x0020;
pub(super) const FCAL: u32 = 0x0028;
pub(super) const FCAH: u32 = 0x002c;
pub(super) const FCT: u32 = 0x0030;
pub(super) const VET: u32 = 0x0038;
pub(super) const ICR: u32 = 0x00c0;
pub(super) const ITR: u32 = 0x00c4;
pub(super) const ICS: u32 = 0x00c8;
pub(super) const IMS: u32 = 0x00d0;
pub(super) const IMC: u32 = 0x00d8;
pub(super) const RCTL: u32 = 0x0100;
pub(super) const FCTTV: u32 = 0x0170;
pub(super) const TXCW: u32 = 0x0178;
pub(super) const TCTL: u32 = 0x0400;
pub(super) const TIPG: u32 = 0x0410;
pub(super) const AIFS: u32 = 0x0458;
pub(super) const LEDCTL: u32 = 0x0e00;
pub(super) const PBA: u32 = 0x1000;
pub(super) const FCRTL: u32 = 0x2160;
pub(super) const FCRTH: u32 = 0x2168;
pub(super) const RDFH: u32 = 0x2410;
pub(super) const RDFPC: u32 = 0x2430;
pub(super) const RDBAL: u32 = 0x2800;
pub(super) const RDBAH: u32 = 0x2804;
pub(super) const RDLEN: u32 = 0x2808;
pub(super) const RDH: u32 = 0x2810;
pub(super) const RDT: u32 = 0x2818;
pub(super) const RDTR: u32 = 0x2820;
pub(super) const RXDCTL: u32 = 0x2828;
pub(super) const RADV: u32 = 0x282c;
pub(super) const RSRPD: u32 = 0x2c00;
pub(super) const TDFH: u32 = 0x3410;
pub(super) const TDFPC: u32 = 0x3430;
pub(super) const TDBAL: u32 = 0x3800;
pub(super) const TDBAH: u32 = 0x3804;
pub(super) const TDLEN: u32 = 0x3808;
pub(super) const TDH: u32 = 0x3810;
pub(super) const TDT: u32 = 0x3818;
pub(super) const TIDV: u32 = 0x3820;
pub(super) const TXDCTL: u32 = 0x3828;
pub(super) const TADV: u32 = 0x382c;
pub(super) const TSPMT: u32 = 0x3830;
pub(super) const STATISTICS: u32 = 0x4000;
pub(super) const STATISTICS_END: u32 = 0x4100;
pub(super) const RXCSUM: u32 = 0x5000;
pub(super) const MTA: u32 = 0x5200;
pub(super) const MTA_END: u32 = 0x5400;
pub(super) const RAL: u32 = 0x5400;
pub(super) const RAL_END: u32 = 0x5480;
pub(super) const VFTA: u32 = 0x5600;
pub(super) const VFTA_END: u32 = 0x5800;
pub(super) const WUC: u32 = 0x5800;
pub(super) const WUFC: u32 = 0x5808;
pub(super) const WUS: u32 = 0x5810;
pub(super) const MANC: u32 = 0x5820;
pub(super) const IPAV: u32 = 0x5838;
pub(super) const WUPL: u32 = 0x5900;
/// End of the registers that are kept.
pub(super) const REGISTERS_END: u32 = 0x6000;

pub(super) const CTRL_FD: u32 = 1 << 0;
pub(super) const CTRL_ASDE: u32 = 1 << 5;
pub(super) const CTRL_SLU: u32 = 1 << 6;
pub(super) const CTRL_SPEED_1000: u32 = 2 << 8;
pub(super) const CTRL_RST: u32 = 1 << 26;
pub(super) const CTRL_VME: u32 = 1 << 30;
pub(super) const CTRL_PHY_RST: u32 = 1 << 31;

pub(super) const STATUS_FD: u32 = 1 << 0;
pub(super) const STATUS_LU: u32 = 1 << 1;
pub(super) const STATUS_SPEED_1000: u32 = 2 << 6;
pub(super) const STATUS_ASDV_1000: u32 = 2 << 8;

pub(super) const EECD_SK: u32 = 1 << 0;
pub(super) const EECD_CS: u32 = 1 << 1;
pub(super) const EECD_DI: u32 = 1 << 2;
pub(super) const EECD_DO: u32 = 1 << 3;
pub(super) const EECD_FWE: u32 = 3 << 4;
pub(super) const EECD_REQ: u32 = 1 << 6;
pub(super) const EECD_GNT: u32 = 1 << 7;
pub(super) const EECD_PRES: u32 = 1 << 8;

pub(super) const EERD_START: u32 = 1 << 0;
pub(super) const EERD_DONE: u32 = 1 << 4;

pub(super) const CTRL_EXT_EE_RST: u32 = 1 << 13;

pub(super) const MDIC_READY: u32 = 1 << 28;
pub(super) const MDIC_INTERRUPT: u32 = 1 << 29;
pub(super) const MDIC_ERROR: u32 = 1 << 30;

pub(super) const ICR_TXDW: u32 = 1 << 0;
pub(super) const ICR_TXQE: u32 = 1 << 1;
pub(super) const ICR_LSC: u32 = 1 << 2;
pub(super) const ICR_RXDMT0: u32 = 1 << 4;
pub(super) const ICR_RXO: u32 = 1 << 6;
pub(super) const ICR_RXT0: u32 = 1 << 7;
pub(super) const ICR_MDAC: u32 = 1 << 9;
pub(super) const ICR_TXD_LOW: u32 = 1 << 15;
/// Causes that exist.
pub(super) const ICR_ALL: u32 = 0x0001_fadf;

pub(super) const RCTL_EN: u32 = 1 << 1;
pub(super) const RCTL_SBP: u32 = 1 << 2;
pub(super) const RCTL_UPE: u32 = 1 << 3;
pub(super) const RCTL_MPE: u32 = 1 << 4;
pub(super) const RCTL_LPE: u32 = 1 << 5;
pub(super) const RCTL_LBM: u32 = 3 << 6;
pub(super) const RCTL_BAM: u32 = 1 << 15;
pub(super) const RCTL_VFE: u32 = 1 << 18;
pub(super) const RCTL_CFIEN: u32 = 1 << 19;
pub(super) const RCTL_CFI: u32 = 1 << 20;
pub(super) const RCTL_BSEX: u32 = 1 << 25;
pub(super) const RCTL_SECRC: u32 = 1 << 26;

pub(super) const TCTL_EN: u32 = 1 << 1;

pub(super) const RXCSUM_IPOFLD: u32 = 1 << 8;
pub(super) const RXCSUM_TUOFLD: u32 = 1 << 9;

pub(super) const RAH_AV: u32 = 1 << 31;

// Statistics, §13.7.
pub(super) const MPC: u32 = 0x4010;
pub(super) const PRC64: u32 = 0x405c;
pub(super) const GPRC: u32 = 0x4074;
pub(super) const BPRC: u32 = 0x4078;
pub(super) const MPRC: u32 = 0x407c;
pub(super) const GPTC: u32 = 0x4080;
pub(super) const GORCL: u32 = 0x4088;
pub(super) const GOTCL: u32 = 0x4090;
pub(super) const RNBC: u32 = 0x40a0;
pub(super) const ROC: u32 = 0x40ac;
pub(super) const TORL: u32 = 0x40c0;
pub(super) const TOTL: u32 = 0x40c8;
pub(super) const TPR: u32 = 0x40d0;
pub(super) const TPT: u32 = 0x40d4;
pub(super) const PTC64: u32 = 0x40d8;
pub(super) const MPTC: u32 = 0x40f0;
pub(super) const BPTC: u32 = 0x40f4;
pub(super) const TSCTC: u32 = 0x40f8;

/// Bits that a store sets in a register that is only kept. `None`: read-only or not there.
pub(super) fn kept(register: u32) -> Option<u32> {
    Some(match register {
        CTRL_EXT | FCAL | FCAH | FCT | VET | FCTTV | TXCW | TIPG | AIFS | LEDCTL | PBA | FCRTL
        | FCRTH | RXDCTL | RSRPD | TXDCTL | TSPMT | RXCSUM | WUC | WUFC | WUS | MANC | IPAV => {
            u32::MAX
        }
        ITR | RADV | TIDV | TADV => 0xffff,
        RDTR => 0xffff,
        RCTL => 0x06df_ffff,
        TCTL => u32::MAX,
        // §13.4.25: rings are aligned to 16 bytes, their length to 128.
        RDBAL | TDBAL => !15,
        RDBAH | TDBAH => u32::MAX,
        RDLEN | TDLEN => 0x000f_ff80,
        RDH | RDT | TDH | TDT => 0xffff,
        RDFH..=RDFPC | TDFH..=TDFPC => 0xffff,
        MTA..MTA_END | RAL..RAL_END | VFTA..VFTA_END => u32::MAX,
        // IPv4 and IPv6 address tables, wake-up packet memory.
        0x5840..0x5860 | 0x5880..0x5890 | 0x5a00..0x5a80 => u32::MAX,
        _ => return None,
    })
}
