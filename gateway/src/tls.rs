//! TLS: a certificate from files, read again when they change, so that a renewal needs no restart.

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// The section `tls`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificate chain in PEM, the server's own first.
    pub cert_file: Option<PathBuf>,
    /// Its private key in PEM.
    pub key_file: Option<PathBuf>,
}

impl TlsConfig {
    /// Whether there is a certificate with its key to serve with.
    pub fn check(&self) -> Result<(), TlsError> {
        Tls::load(self).map(drop)
    }
}

/// Why TLS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("listen_tls is set without tls.cert_file and tls.key_file: set both")]
    NoFiles,
    #[error("cannot read {what} from `{path}`: {reason}")]
    File { what: &'static str, path: PathBuf, reason: String },
    #[error("the certificate in `{cert}` and the key in `{key}` do not fit together: {reason}")]
    Mismatch { cert: PathBuf, key: PathBuf, reason: String },
}

/// A client has this long for its side of the handshake.
const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);
/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Shakes hands with the newest good certificate.
pub(crate) struct Tls {
    cert: PathBuf,
    key: PathBuf,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    pub(crate) fn load(config: &TlsConfig) -> Result<Tls, TlsError> {
        let (Some(cert), Some(key)) = (config.cert_file.clone(), config.key_file.clone()) else {
            return Err(TlsError::NoFiles);
        };
        let current = RwLock::new(Arc::new(read(&cert, &key)?));
        Ok(Tls { cert, key, current })
    }

    /// The stream once both sides agree; nothing where they do not, or not in time.
    pub(crate) async fn accept(&self, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(self.current.read().clone());
        match tokio::time::timeout(HANDSHAKE_WAIT, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(%error, "a TLS handshake failed");
                None
            }
            Err(_) => None,
        }
    }

    /// Takes the files as they are now; keeps the certificate in force where they are no good.
    fn reload(&self) -> Result<(), TlsError> {
        *self.current.write() = Arc::new(read(&self.cert, &self.key)?);
        Ok(())
    }

    /// Looks at the files from time to time, for ever.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut known = self.changed_at();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.changed_at();
            if now == known {
                continue;
            }
            match self.reload() {
                Ok(()) => {
                    known = now;
                    tracing::info!(cert = %self.cert.display(), "serving a new certificate");
                }
                // half of a renewal may be written yet: the next look may find the whole
                Err(error) => tracing::warn!(%error, "the certificate in force stays"),
            }
        }
    }

    fn changed_at(&self) -> [Option<SystemTime>; 2] {
        [&self.cert, &self.key].map(|path| std::fs::metadata(path).and_then(|data| data.modified()).ok())
    }
}

fn read(cert: &Path, key: &Path) -> Result<ServerConfig, TlsError> {
    let file = |what, path: &Path, reason: String| TlsError::File { what, path: path.to_owned(), reason };
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|error| file("a certificate chain", cert, error.to_string()))?;
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| file("a private key", key, error.to_string()))?;
    let mismatch =
        |error: rustls::Error| TlsError::Mismatch { cert: cert.into(), key: key.into(), reason: error.to_string() };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(mismatch)?.with_no_client_auth();
    let mut config = builder.with_single_cert(chain, secret).map_err(mismatch)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::process::Command;

    /// Certificate and key of `name`, signed by themselves; nothing where there is no openssl.
    pub(crate) fn certificate(dir: &Path, name: &str) -> Option<TlsConfig> {
        let (cert, key, conf) = (dir.join("cert.pem"), dir.join("key.pem"), dir.join("openssl.conf"));
        let leaf = format!("subjectAltName=DNS:{name}\nbasicConstraints=critical,CA:FALSE\n");
        let text = format!("[req]\ndistinguished_name=dn\nx509_extensions=leaf\n[dn]\n[leaf]\n{leaf}");
        std::fs::write(&conf, text).unwrap();
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
            .args(["-subj", &format!("/CN={name}"), "-config"])
            .arg(&conf)
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&cert)
            .output();
        if !made.is_ok_and(|made| made.status.success()) {
            println!("skipped: openssl is not there to make a certificate");
            return None;
        }
        Some(TlsConfig { cert_file: Some(cert), key_file: Some(key) })
    }

    #[test]
    fn a_renewed_certificate_is_taken_and_a_broken_one_leaves_the_old_in_force() {
        let dir = tempfile::TempDir::new().unwrap();
        assert!(matches!(Tls::load(&TlsConfig::default()), Err(TlsError::NoFiles)));
        let Some(config) = certificate(dir.path(), "one.example") else { return };
        let tls = Tls::load(&config).unwrap();
        let first = tls.current.read().clone();
        std::fs::write(config.cert_file.as_ref().unwrap(), "half a certificate").unwrap();
        let error = tls.reload().unwrap_err().to_string();
        assert!(error.contains("cert.pem"), "{error}");
        assert!(Arc::ptr_eq(&first, &tls.current.read()));
        certificate(dir.path(), "two.example");
        tls.reload().unwrap();
        assert!(!Arc::ptr_eq(&first, &tls.current.read()));
    }
}
