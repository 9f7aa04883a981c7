//! Writes numbers without `std::fmt`, which is too slow for a path that runs twice for each traced
//! call.

/// Appends text and numbers to a buffer.
pub(crate) trait Put {
    fn put(&mut self, text: &str);
    fn put_dec(&mut self, number: u64);
    fn put_int(&mut self, number: i64);
    fn put_hex(&mut self, number: u128);
}

impl Put for Vec<u8> {
    fn put(&mut self, text: &str) {
        self.extend_from_slice(text.as_bytes());
    }

    fn put_dec(&mut self, mut number: u64) {
        let mut digits = [0; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.extend_from_slice(&digits[at..]);
    }

    fn put_int(&mut self, number: i64) {
        if number < 0 {
            self.push(b'-');
        }
        self.put_dec(number.unsigned_abs());
    }

    /// With `0x`. Takes 128 bits because the end of a range that reaches the last address is 2^64.
    fn put_hex(&mut self, number: u128) {
        let mut digits = [0; 34];
        let mut at = digits.len();
        let mut rest = number;
        loop {
            at -= 1;
            digits[at] = b"0123456789abcdef"[(rest & 0xf) as usize];
            rest >>= 4;
            if rest == 0 {
                break;
            }
        }
        digits[at - 2..at].copy_from_slice(b"0x");
        self.extend_from_slice(&digits[at - 2..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn numbers_come_out_as_format_would_write_them() {
        for n in [0, 1, 9, 10, 4096, u64::MAX] {
            assert_eq!(text(|out| out.put_dec(n)), n.to_string());
            assert_eq!(text(|out| out.put_hex(n.into())), format!("{n:#x}"));
        }
        for n in [0, -1, 22, i64::MIN, i64::MAX] {
            assert_eq!(text(|out| out.put_int(n)), n.to_string());
        }
        assert_eq!(text(|out| out.put_hex(1 << 64)), "0x10000000000000000");
        assert_eq!(
            text(|out| out.put_hex(u128::MAX)),
            format!("{:#x}", u128::MAX)
        );
    }
}
