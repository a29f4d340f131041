//! The opening handshake of RFC 6455: checks the request, agrees on a form of messages, and answers.

use crate::hub::Form;
use crate::problem::Problem;
use axum::body::Body;
use axum::http::header::{
    AUTHORIZATION, CONNECTION, HOST, ORIGIN, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

/// Text frames of JSON.
const PROTOCOL: &str = "tidewatch.v1";
/// Binary frames of MessagePack.
const PROTOCOL_PACKED: &str = "tidewatch.v1.msgpack";
/// What RFC 6455 puts behind the client's key.
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// RFC 7692, each message by itself: a connection that is idle needs no memory for it, and all clients share the bytes.
const DEFLATE: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

/// The comma-separated values of all headers of this name.
fn values(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let all = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    all.flat_map(|value| value.split(',')).map(str::trim).filter(|value| !value.is_empty())
}

/// The token of `Authorization: Bearer TOKEN`, else of the subprotocol `bearer.TOKEN`.
pub(crate) fn token_of(headers: &HeaderMap) -> Option<String> {
    let header = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.split_once(' '));
    let header = header.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
    let protocol = || values(headers, SEC_WEBSOCKET_PROTOCOL).find_map(|protocol| protocol.strip_prefix("bearer."));
    header.or_else(protocol).map(str::to_owned)
}

/// Whether a page of this origin may connect: one of this host or of a listed origin. Programs send none.
pub(super) fn is_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let same_host =
        origin.split_once("://").is_some_and(|(_, of)| host.is_some_and(|host| of.eq_ignore_ascii_case(host)));
    same_host || origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin))
}

/// What client and server agreed on.
pub(super) struct Agreed {
    pub(super) form: Form,
    /// The client may compress its messages.
    pub(super) inflates: bool,
    pub(super) response: Response,
}

/// Agrees to speak with a client, or says what is wrong with its request.
pub(super) fn agree(method: &Method, headers: &HeaderMap) -> Result<Agreed, Problem> {
    let has = |name: HeaderName, wanted: &str| values(headers, name).any(|value| value.eq_ignore_ascii_case(wanted));
    if method != Method::GET || !has(UPGRADE, "websocket") || !has(CONNECTION, "upgrade") {
        let detail = "this is a WebSocket: connect with ws:// or wss://, as RFC 6455 says";
        return Err(Problem::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", detail));
    }
    if !has(SEC_WEBSOCKET_VERSION, "13") {
        let detail = "send `sec-websocket-version: 13`: no other version is spoken here";
        return Err(Problem::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", detail));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes);
    let Some(key) = key.filter(|key| STANDARD.decode(key).is_ok_and(|key| key.len() == 16)) else {
        return Err(Problem::invalid("bad_handshake", "sec-websocket-key must be 16 bytes in base64"));
    };
    let accept = STANDARD.encode(Sha1::new().chain_update(key).chain_update(GUID).finalize());
    let mut response = (StatusCode::SWITCHING_PROTOCOLS, Body::empty()).into_response();
    let answer = response.headers_mut();
    answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    answer.insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::try_from(accept).map_err(Problem::internal)?);
    let protocol = values(headers, SEC_WEBSOCKET_PROTOCOL).find(|name| [PROTOCOL, PROTOCOL_PACKED].contains(name));
    if let Some(name) = protocol {
        let name = if name == PROTOCOL { PROTOCOL } else { PROTOCOL_PACKED };
        answer.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    }
    let inflates = values(headers, SEC_WEBSOCKET_EXTENSIONS).any(may_deflate);
    if inflates {
        answer.insert(SEC_WEBSOCKET_EXTENSIONS, HeaderValue::from_static(DEFLATE));
    }
    let form = match (protocol, inflates) {
        (Some(PROTOCOL_PACKED), _) => Form::Packed,
        (_, true) => Form::Deflated,
        (_, false) => Form::Text,
    };
    Ok(Agreed { form, inflates, response })
}

/// Whether this is an offer of permessage-deflate that can be taken: its window is the usual one.
fn may_deflate(offer: &str) -> bool {
    let mut parts = offer.split(';').map(str::trim);
    let mut seen = Vec::new();
    parts.next() == Some("permessage-deflate")
        && parts.all(|part| {
            let (name, value) = part.split_once('=').map_or((part, None), |(name, value)| (name, Some(value)));
            let value = value.map(|value| value.trim_matches('"'));
            let bits = |value: &str| value.parse::<u8>().is_ok_and(|bits| (8..=15).contains(&bits));
            let is_new = !seen.contains(&name);
            seen.push(name);
            is_new
                && match (name, value) {
                    ("server_no_context_takeover" | "client_no_context_takeover" | "client_max_window_bits", None) => {
                        true
                    }
                    ("client_max_window_bits", Some(value)) => bits(value),
                    ("server_max_window_bits", Some(value)) => value == "15",
                    _ => false,
                }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(origin: Option<&'static str>) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, HeaderValue::from_static("Tide.example:8080"));
        if let Some(origin) = origin {
            headers.insert(ORIGIN, HeaderValue::from_static(origin));
        }
        is_allowed(&headers, &["https://app.example.com".to_owned()])
    }

    #[test]
    fn pages_of_this_host_and_of_listed_origins_may_connect_others_not() {
        assert!(allowed(None) && allowed(Some("http://tide.example:8080")) && allowed(Some("https://app.example.com")));
        for foreign in
            ["null", "http://tide.example", "https://evil.example", "https://app.example.com.evil.example", ""]
        {
            assert!(!allowed(Some(foreign)), "{foreign}");
        }
    }

    fn asked(more: &[(&'static str, &'static str)]) -> Result<Agreed, Problem> {
        let mut headers = HeaderMap::new();
        // the key and the answer to it are those of RFC 6455 section 1.3
        for (name, value) in [
            ("upgrade", "WebSocket"),
            ("connection", "keep-alive, Upgrade"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ]
        .iter()
        .chain(more)
        {
            headers.insert(*name, HeaderValue::from_static(value));
        }
        agree(&Method::GET, &headers)
    }

    #[test]
    fn the_handshake_is_that_of_the_rfc() {
        let agreed = asked(&[]).unwrap();
        assert_eq!(agreed.response.status(), 101);
        assert_eq!(agreed.response.headers()[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        for (name, value, code) in [
            ("upgrade", "h2c", "upgrade_required"),
            ("connection", "close", "upgrade_required"),
            ("sec-websocket-version", "8", "upgrade_required"),
            ("sec-websocket-key", "short", "bad_handshake"),
        ] {
            let refused = asked(&[(name, value)]).err().unwrap();
            assert_eq!(refused.code, code, "{name}");
            let version = refused.into_response().headers().get(SEC_WEBSOCKET_VERSION).cloned();
            assert_eq!(version.is_some_and(|version| version == "13"), code == "upgrade_required", "{name}");
        }
    }

    #[test]
    fn the_first_known_subprotocol_decides_the_form() {
        let form = |offered| asked(&[("sec-websocket-protocol", offered)]).unwrap();
        let packed = form("bearer.x, tidewatch.v1.msgpack, tidewatch.v1");
        assert_eq!(packed.form, Form::Packed);
        assert_eq!(packed.response.headers()[SEC_WEBSOCKET_PROTOCOL], "tidewatch.v1.msgpack");
        assert_eq!(form("tidewatch.v1").form, Form::Text);
        assert!(!form("graphql-ws").response.headers().contains_key(SEC_WEBSOCKET_PROTOCOL));
    }

    #[test]
    fn compression_is_taken_where_its_parameters_can_be_kept() {
        let taken = |offer| asked(&[("sec-websocket-extensions", offer)]).unwrap().inflates;
        assert!(taken("permessage-deflate; client_max_window_bits"));
        assert!(taken("x-webkit-deflate-frame, permessage-deflate; server_max_window_bits=15"));
        assert!(taken("permessage-deflate; server_max_window_bits=10, permessage-deflate"), "the second offer is good");
        for bad in [
            "permessage-deflate; server_max_window_bits=10",
            "permessage-deflate; client_max_window_bits=16",
            "permessage-deflate; unknown",
            "permessage-deflate; client_no_context_takeover; client_no_context_takeover",
            "x-webkit-deflate-frame",
        ] {
            assert!(!taken(bad), "{bad}");
        }
    }
}
