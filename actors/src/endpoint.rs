//! One attempt to tell a webhook: signed as Standard Webhooks says (https://www.standardwebhooks.com, specification of
//! 2023), and sent only to addresses of the public Internet.

use crate::outward::{client_config, reason};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::DateTime;
use engine::event::Micros;
use hmac::{Hmac, Mac};
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use sha2::Sha256;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// What a secret as text begins with.
const SECRET: &str = "whsec_";
/// Bytes of a secret, by the specification.
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;
/// Bytes of a secret that is made here: as many as the hash has.
const SECRET_BYTES_MADE: usize = 32;
const URL_BYTES_MAX: usize = 2_000;
/// How long a name that is being defined may take to be looked up; one that takes longer is looked up when it is used.
const LOOK_UP_WITHIN: Duration = Duration::from_secs(2);

/// A new secret.
pub(crate) fn new_secret() -> Vec<u8> {
    rand::random::<[u8; SECRET_BYTES_MADE]>().to_vec()
}

/// A secret as people see it: `whsec_` and base64.
pub(crate) fn secret_text(secret: &[u8]) -> String {
    format!("{SECRET}{}", STANDARD.encode(secret))
}

/// The secret in a text; `None` where it is none, or one too short or too long.
pub(crate) fn secret_of(text: &str) -> Option<Vec<u8>> {
    let secret = STANDARD.decode(text.strip_prefix(SECRET)?).ok()?;
    SECRET_BYTES.contains(&secret.len()).then_some(secret)
}

/// The header `webhook-signature`: one for each secret, so that a receiver may know either.
fn signatures(secrets: &[Vec<u8>], id: &str, seconds: i64, body: &str) -> String {
    let all: Vec<String> = secrets.iter().map(|secret| signature(secret, id, seconds, body)).collect();
    all.join(" ")
}

/// HMAC-SHA256 (RFC 2104) of id, time in seconds and body.
fn signature(secret: &[u8], id: &str, seconds: i64, body: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes a key of any length");
    mac.update(format!("{id}.{seconds}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

/// How long the receiver asks to be left alone: seconds or a date (RFC 9110, 10.2.3).
fn retry_after(value: &str, now: Micros) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let date = DateTime::parse_from_rfc2822(value.trim()).ok()?;
    Some(Duration::from_micros(Micros(date.timestamp_micros()).since(now).0.unsigned_abs()))
}

/// Whether something on the public Internet may be at an address: not this machine, a private network, what is near,
/// or what the registries of IANA keep for special purposes. An IPv6 address that stands for one of IPv4 is judged as
/// that.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    // https://www.iana.org/assignments/iana-ipv4-special-registry
    const SPECIAL: [([u8; 4], u32); 15] = [
        ([0, 0, 0, 0], 8),       // this network
        ([10, 0, 0, 0], 8),      // private
        ([100, 64, 0, 0], 10),   // shared by customers of a carrier
        ([127, 0, 0, 0], 8),     // this machine
        ([169, 254, 0, 0], 16),  // link-local, and metadata of cloud machines
        ([172, 16, 0, 0], 12),   // private
        ([192, 0, 0, 0], 24),    // protocol assignments
        ([192, 0, 2, 0], 24),    // documentation
        ([192, 88, 99, 0], 24),  // relays to IPv6
        ([192, 168, 0, 0], 16),  // private
        ([198, 18, 0, 0], 15),   // benchmarks
        ([198, 51, 100, 0], 24), // documentation
        ([203, 0, 113, 0], 24),  // documentation
        ([224, 0, 0, 0], 4),     // multicast
        ([240, 0, 0, 0], 4),     // reserved, and broadcast
    ];
    let is_in =
        |(base, bits): &([u8; 4], u32)| (address.to_bits() ^ Ipv4Addr::from(*base).to_bits()) >> (32 - bits) == 0;
    !SPECIAL.iter().any(is_in)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let parts = address.segments();
    let inner = |high: u16, low: u16| is_public_v4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
    match parts {
        [0, 0, 0, 0, 0, 0xffff, high, low] => inner(high, low), // mapped
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => inner(high, low), // NAT64
        [0x2002, high, low, ..] => inner(high, low),            // 6to4
        [0x2001, 0..0x200, ..] => false,                        // protocol assignments, Teredo among them
        [0x2001, 0xdb8, ..] | [0x3fff, 0..0x1000, ..] => false, // documentation
        // what is global is in 2000::/3 (https://www.iana.org/assignments/ipv6-unicast-address-assignments)
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// Whether a name is this machine's by itself, whatever who is asked for it says (RFC 6761, section 6.3).
fn is_local(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host);
    name.rsplit('.').next().is_some_and(|last| last.eq_ignore_ascii_case("localhost"))
}

/// Why a webhook cannot be where it is said to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadUrl {
    #[error("it is no URL ({0}); write it as https://hooks.example.com/path")]
    Unreadable(String),
    #[error("it is longer than {URL_BYTES_MAX} bytes")]
    TooLong,
    #[error("`{0}` is neither https nor, where webhooks.allow_private is set, http")]
    Scheme(String),
    #[error("it holds a user name or password; use the signature to know who calls")]
    Credentials,
    /// Where the name leads is not said: it may be the business of a network inside.
    #[error("`{0}` has an address that is not public; only webhooks.allow_private lets those be called")]
    Private(String),
    #[error("nothing listens on port 0")]
    Port,
    #[error("`{0}` has no address")]
    Nowhere(String),
}

/// Decides which addresses may be called, when a name is looked up to connect to it.
#[derive(Clone, Copy)]
struct Guard {
    allow_private: bool,
}

impl Guard {
    /// Every address of a name counts: one that has a private one beside a public one is not to be trusted with either.
    fn check(self, host: &str, addresses: &[SocketAddr]) -> Result<(), BadUrl> {
        if addresses.is_empty() {
            return Err(BadUrl::Nowhere(host.to_owned()));
        }
        if self.allow_private || addresses.iter().all(|address| is_public(address.ip())) {
            return Ok(());
        }
        Err(BadUrl::Private(host.to_owned()))
    }

    /// The URL, if it may be called as far as it tells by itself.
    fn read(self, text: &str) -> Result<Url, BadUrl> {
        if text.len() > URL_BYTES_MAX {
            return Err(BadUrl::TooLong);
        }
        let url = Url::parse(text).map_err(|error| BadUrl::Unreadable(error.to_string()))?;
        if url.scheme() != "https" && !(self.allow_private && url.scheme() == "http") {
            return Err(BadUrl::Scheme(url.scheme().to_owned()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(BadUrl::Credentials);
        }
        // an address in the place of a name is looked up by nobody; the parser has read `127.1` and `0x7f000001` as one
        let host = url.host_str().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse::<IpAddr>() {
            self.check(host, &[SocketAddr::new(address, 0)])?;
        }
        if !self.allow_private && is_local(host) {
            return Err(BadUrl::Private(host.to_owned()));
        }
        if url.port() == Some(0) {
            return Err(BadUrl::Port);
        }
        Ok(url)
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = *self;
        Box::pin(async move {
            let addresses: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            guard.check(name.as_str(), &addresses)?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// What a receiver said.
#[derive(Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) retry_after: Option<Duration>,
}

/// Calls webhooks.
pub(crate) struct Courier {
    client: reqwest::Client,
    guard: Guard,
}

impl Courier {
    /// Gives every call `timeout` in all.
    pub(crate) fn new(allow_private: bool, timeout: Duration) -> Result<Courier, String> {
        let guard = Guard { allow_private };
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(client_config()?)
            .dns_resolver(guard)
            // a proxy would look the name up again, and somewhere else
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(timeout)
            .user_agent("Tidewatch")
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Courier { client, guard })
    }

    /// Whether a webhook may be at `text`, as far as can be told now: a call looks again.
    pub(crate) async fn check(&self, text: &str) -> Result<(), BadUrl> {
        let url = self.guard.read(text)?;
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or_default();
        match tokio::time::timeout(LOOK_UP_WITHIN, tokio::net::lookup_host((host, port))).await {
            Ok(Ok(found)) => self.guard.check(host, &found.collect::<Vec<_>>()),
            Ok(Err(_)) | Err(_) => Ok(()), // it may be there later
        }
    }

    /// Sends `body` as the message `id`, signed with each of the secrets. What the receiver answers beyond its head is not
    /// read.
    pub(crate) async fn post(
        &self,
        url: &str,
        secrets: &[Vec<u8>],
        [id, body]: [&str; 2],
        now: Micros,
    ) -> Result<Answer, String> {
        let url = self.guard.read(url).map_err(|error| error.to_string())?;
        let seconds = now.0.div_euclid(1_000_000);
        let request = self
            .client
            .post(url)
            .header(CONTENT_TYPE, "application/json")
            .header("webhook-id", id)
            .header("webhook-timestamp", seconds)
            .header("webhook-signature", signatures(secrets, id, seconds, body))
            .header("idempotency-key", id)
            .body(body.to_owned());
        let answer = request.send().await.map_err(|error| reason(&error))?;
        let wait = answer.headers().get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?, now));
        Ok(Answer { status: answer.status().as_u16(), retry_after: wait })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the libraries at https://github.com/standard-webhooks/standard-webhooks, which all test with it.
    #[test]
    fn the_published_example_has_the_published_signature() {
        let secret = secret_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signed = signature(&secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, "{\"test\": 2432232314}");
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn each_secret_signs_and_a_space_is_between() {
        let secrets = [vec![1; 32], vec![2; 32]];
        let alone = secrets.each_ref().map(|secret| signature(secret, "msg_1", 7, "{}"));
        assert_eq!(signatures(&secrets, "msg_1", 7, "{}"), alone.join(" "));
        assert_ne!(alone[0], alone[1]);
    }

    #[test]
    fn a_secret_reads_back_as_it_is_shown_and_others_are_refused() {
        let secret = new_secret();
        assert_eq!(secret_of(&secret_text(&secret)), Some(secret.clone()));
        assert_ne!(secret, new_secret());
        for bad in ["", "whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_short", "whsec_????", "whsec_MfKQ9r8GKYqr"]
        {
            assert_eq!(secret_of(bad), None, "{bad}");
        }
        assert_eq!(secret_of(&secret_text(&[7; 65])), None);
    }

    #[test]
    fn a_receiver_may_ask_for_a_wait_in_seconds_or_until_a_date() {
        let now = Micros(784_111_770_000_000);
        for (value, wait) in [
            ("120", Some(120)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(7)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
            ("", None),
        ] {
            assert_eq!(retry_after(value, now), wait.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn only_addresses_of_the_public_internet_are_public() {
        for public in ["1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for private in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.168.1.1",
            "198.19.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::7f00:1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
            "2001::1",
            "2001:db8::1",
            "100::1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
    }

    #[test]
    fn a_url_is_read_as_those_who_call_it_read_it() {
        let (guard, open) = (Guard { allow_private: false }, Guard { allow_private: true });
        for good in ["https://hooks.example.com/x?y=1", "https://1.1.1.1/", "https://[2606:4700::1111]:8443/"] {
            assert!(guard.read(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "example.com",
            "http://example.com/",
            "ftp://example.com/",
            "https://user:pass@example.com/",
            "https://127.0.0.1/",
            "https://127.1/",
            "https://0x7f000001/",
            "https://2130706433/",
            "https://0177.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:127.0.0.1]/",
            "https://169.254.169.254/latest/meta-data",
            "https://localhost/",
            "https://LocalHost./",
            "https://db.localhost:8443/",
            "https://example.com:0/",
        ] {
            assert!(guard.read(bad).is_err(), "{bad}");
        }
        assert!(open.read("http://localhost.:8080/").is_ok() && open.read("http://localhost:0/").is_err());
        assert!(guard.read("https://localhost.example.com/").is_ok());
        assert!(open.read("http://127.0.0.1:8080/").is_ok() && open.read("file:///etc/passwd").is_err());
        let long = format!("https://example.com/{}", "a".repeat(URL_BYTES_MAX));
        assert!(matches!(guard.read(&long), Err(BadUrl::TooLong)));
    }

    #[tokio::test]
    async fn a_name_is_judged_by_where_it_leads_when_it_is_called() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let courier = Courier::new(false, Duration::from_secs(5)).unwrap();
        let url = format!("https://localhost:{port}/");
        assert!(matches!(courier.check(&url).await, Err(BadUrl::Private(_))));
        let refused = courier.post(&url, &[vec![7; 32]], ["msg_1", "{}"], Micros(1)).await.unwrap_err();
        assert!(refused.contains("`localhost` has an address that is not public"), "{refused}");
        let dialled = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(dialled.is_err(), "nothing may have connected");
        let resolved = Guard { allow_private: false }.resolve("localhost".parse().unwrap()).await;
        assert!(resolved.is_err(), "nor is a name that leads there only now");
        // one private address among public ones is enough
        let both = ["1.1.1.1:0", "10.0.0.1:0"].map(|address| address.parse().unwrap());
        let guard = Guard { allow_private: false };
        assert!(guard.check("two.example.com", &both).is_err() && guard.check("one.example.com", &both[..1]).is_ok());
    }
}
