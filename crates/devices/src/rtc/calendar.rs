//! Gregorian calendar, as far as a clock chip needs it.

/// A moment in UTC. Every field is within its range; the year is at most 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub year: u16,
    pub month: u8,
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

const DAY_S: i64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;
/// Days of 400 years.
const ERA: i64 = 146_097;

impl DateTime {
    /// Times before 1970 and after 9999 show the nearest moment that can be shown.
    pub(super) fn from_unix(unix: i64) -> DateTime {
        let unix = unix.clamp(0, 253_402_300_799);
        let (days, s) = (unix / DAY_S, unix % DAY_S);
        // Years that begin in March have their leap day last.
        let z = days + EPOCH;
        let (era, doe) = (z / ERA, z % ERA);
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        DateTime {
            year: (yoe + era * 400 + i64::from(month <= 2)) as u16,
            month: month as u8,
            day: (doy - (153 * mp + 2) / 5 + 1) as u8,
            hour: (s / 3600) as u8,
            minute: (s / 60 % 60) as u8,
            second: (s % 60) as u8,
        }
    }

    fn days(&self) -> i64 {
        let month = i64::from(self.month);
        let y = i64::from(self.year) - i64::from(month <= 2);
        let (era, yoe) = (y.div_euclid(400), y.rem_euclid(400));
        let mp = (month + 9) % 12;
        let doy = (153 * mp + 2) / 5 + i64::from(self.day) - 1;
        era * ERA + yoe * 365 + yoe / 4 - yoe / 100 + doy - EPOCH
    }

    /// A day that the month does not have runs over into the next month.
    pub(super) fn to_unix(self) -> i64 {
        let s = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60;
        self.days() * DAY_S + s + i64::from(self.second)
    }

    /// 1 = Sunday.
    pub(super) fn weekday(&self) -> u8 {
        ((self.days() + 4).rem_euclid(7) + 1) as u8
    }
}
