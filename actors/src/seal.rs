//! Secrets that must be read again, such as those of webhooks and second factors, encrypted before they are stored: XChaCha20-Poly1305
//! (draft-irtf-cfrg-xchacha-03) under a key that the store never sees.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};
use sha2::{Digest, Sha256};

const NONCE_BYTES: usize = 24;

/// What was sealed cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error(
        "a stored secret was sealed with the key `{0}`, which is not configured; add it to auth.previous_encryption_keys"
    )]
    UnknownKey(String),
    #[error("a stored secret was changed, or belongs to somebody else")]
    Broken,
}

/// Seals with the first key, opens with any.
pub struct Sealer {
    keys: Vec<(String, XChaCha20Poly1305)>,
}

impl Sealer {
    /// `keys`: the one in use, then those of before. Any text of 32 bytes or more; what encrypts is derived from it.
    pub fn new<'a>(keys: impl Iterator<Item = &'a str>) -> Sealer {
        let derived = |text: &str| {
            let key = Sha256::new().chain_update(b"tidewatch seal 1\0").chain_update(text).finalize();
            let id = Sha256::new().chain_update(b"tidewatch seal id\0").chain_update(key).finalize();
            let id = id.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
            (id, XChaCha20Poly1305::new(&Key::from(<[u8; 32]>::from(key))))
        };
        Sealer { keys: keys.map(derived).collect() }
    }

    /// Encrypts `secret` for `owner`: opened for nobody else. The text names its key and differs each time.
    pub fn seal(&self, owner: &str, secret: &[u8]) -> String {
        let (id, cipher) = self.keys.first().expect("a sealer has a key");
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let payload = Payload { msg: secret, aad: owner.as_bytes() };
        let sealed = cipher.encrypt(&XNonce::from(nonce), payload).expect("a short secret in memory can be encrypted");
        format!("v1.{id}.{}", URL_SAFE_NO_PAD.encode([nonce.as_slice(), &sealed].concat()))
    }

    /// The secret that was sealed for `owner`.
    pub fn open(&self, owner: &str, sealed: &str) -> Result<Vec<u8>, SealError> {
        let mut parts = sealed.splitn(3, '.');
        let (Some("v1"), Some(id), Some(text)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(SealError::Broken);
        };
        let known = self.keys.iter().find(|(known, _)| known == id);
        let (_, cipher) = known.ok_or_else(|| SealError::UnknownKey(id.to_owned()))?;
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| SealError::Broken)?;
        let (nonce, sealed) = bytes.split_first_chunk::<NONCE_BYTES>().ok_or(SealError::Broken)?;
        let payload = Payload { msg: sealed, aad: owner.as_bytes() };
        cipher.decrypt(&XNonce::from(*nonce), payload).map_err(|_| SealError::Broken)
    }

    /// Whether `sealed` is under the key in use.
    pub fn is_current(&self, sealed: &str) -> bool {
        let id = sealed.split('.').nth(1);
        self.keys.first().is_some_and(|(current, _)| id == Some(current))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "an old key of more than thirty-two bytes";
    const NEW: &str = "a new key of more than thirty-two bytes";

    #[test]
    fn a_secret_opens_for_its_owner_only_and_is_sealed_differently_each_time() {
        let sealer = Sealer::new([NEW].into_iter());
        let (one, two) = (sealer.seal("totp/ann", b"secret"), sealer.seal("totp/ann", b"secret"));
        assert!(one != two && !one.contains("secret"));
        assert_eq!(sealer.open("totp/ann", &one).unwrap(), b"secret");
        assert!(matches!(sealer.open("totp/bob", &one), Err(SealError::Broken)));
        for junk in ["", "v1", "v1.x", "v2.a.b", &one[..one.len() - 2]] {
            assert!(sealer.open("totp/ann", junk).is_err(), "{junk}");
        }
    }

    #[test]
    fn a_key_of_before_opens_and_a_forgotten_one_is_named() {
        let sealed = Sealer::new([OLD].into_iter()).seal("o", b"secret");
        let both = Sealer::new([NEW, OLD].into_iter());
        assert_eq!(both.open("o", &sealed).unwrap(), b"secret");
        assert!(!both.is_current(&sealed) && both.is_current(&both.seal("o", b"")));
        let error = Sealer::new([NEW].into_iter()).open("o", &sealed).unwrap_err().to_string();
        assert!(error.contains("auth.previous_encryption_keys"), "{error}");
    }
}
