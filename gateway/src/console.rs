//! The web console, embedded in the binary.

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::response::{Html, IntoResponse, Response};
use rust_embed::{EmbeddedFile, RustEmbed};

#[derive(RustEmbed)]
#[folder = "web/dist/"]
struct Dist;

const INDEX: &str = "index.html";

/// The page may load from this server only. Inline styles are those that components set on their elements.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; base-uri 'none'; \
     form-action 'self'; frame-ancestors 'none'",
);

/// Files with a hash in their name never change.
const FOR_EVER: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");
const ASK_EACH_TIME: HeaderValue = HeaderValue::from_static("no-cache");

/// What is served at `/` while the console has not been built.
const NOT_BUILT: &str = "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Tidewatch</title>\
    <h1>Tidewatch runs</h1><p>This build has no web console. To add it, run <code>npm ci &amp;&amp; npm run build</code> \
    in <code>gateway/web</code> and build the binary again.<p>The HTTP API is described at <a href=\"/docs\">/docs</a>.";

/// Whether this build has the file.
pub(crate) fn has(path: &str) -> bool {
    Dist::get(path).is_some()
}

/// What is behind these is never a page: a probe of `/ready/` would take it for an answer.
const NO_PAGES: [&str; 7] = ["api", "ai", "health", "ready", "metrics", "openapi.json", "docs"];

/// Serves what no route took: files of the console, and its page for every address that is no file and no API.
pub(crate) async fn fallback(method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let path = uri.path().trim_start_matches('/');
    let is_read = matches!(method, Method::GET | Method::HEAD);
    if !is_read || path.split('/').next().is_some_and(|first| NO_PAGES.contains(&first)) {
        return StatusCode::NOT_FOUND.into_response();
    }
    if let Some(found) = Dist::get(path) {
        return file(path, found, &headers);
    }
    // what looks like a file is one that is missing, not a page
    if path.rsplit('/').next().is_some_and(|name| name.contains('.')) {
        return StatusCode::NOT_FOUND.into_response();
    }
    match Dist::get(INDEX) {
        Some(index) => file(INDEX, index, &headers),
        None if path.is_empty() => ([(CONTENT_SECURITY_POLICY, POLICY)], Html(NOT_BUILT)).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn file(path: &str, found: EmbeddedFile, headers: &HeaderMap) -> Response {
    let hash: String = found.metadata.sha256_hash().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let tag = HeaderValue::from_str(&format!("\"{hash}\"")).expect("hexadecimal in quotes is a header value");
    let cache = if path.starts_with("assets/") { FOR_EVER } else { ASK_EACH_TIME };
    if is_known(headers, &tag) {
        // the browser keeps the headers of this answer instead of those it had: the page's policy is among them
        let headers = [(ETAG, tag), (CACHE_CONTROL, cache), (CONTENT_SECURITY_POLICY, POLICY)];
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    let kind = HeaderValue::from_str(found.metadata.mimetype());
    let kind = kind.unwrap_or(HeaderValue::from_static("application/octet-stream"));
    let headers = [(CONTENT_TYPE, kind), (ETAG, tag), (CACHE_CONTROL, cache), (CONTENT_SECURITY_POLICY, POLICY)];
    (headers, Body::from(found.data.into_owned())).into_response()
}

/// Whether the client has what has this tag: RFC 9110, section 13.1.2, compared weakly.
fn is_known(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let all = headers.get_all(IF_NONE_MATCH).into_iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    all.map(<[u8]>::trim_ascii)
        .any(|known| known == b"*" || known.strip_prefix(b"W/").unwrap_or(known) == tag.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn status(method: Method, path: &'static str) -> u16 {
        fallback(method, Uri::from_static(path), HeaderMap::new()).await.status().as_u16()
    }

    #[tokio::test]
    async fn a_page_that_is_asked_for_again_keeps_its_policy() {
        let first = fallback(Method::GET, Uri::from_static("/"), HeaderMap::new()).await;
        let Some(tag) = first.headers().get(ETAG) else { return println!("skipped: this build has no console") };
        let again = HeaderMap::from_iter([(IF_NONE_MATCH, tag.clone())]);
        let again = fallback(Method::GET, Uri::from_static("/"), again).await;
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        assert_eq!(again.headers()[CONTENT_SECURITY_POLICY], POLICY);
    }

    #[test]
    fn a_file_is_known_by_its_tag_strong_or_weak_alone_or_among_others() {
        let known = |values: &[&'static str]| {
            let values = values.iter().map(|value| (IF_NONE_MATCH, HeaderValue::from_static(value)));
            let mut headers = HeaderMap::new();
            values.for_each(|(name, value)| _ = headers.append(name, value));
            is_known(&headers, &HeaderValue::from_static("\"abc\""))
        };
        for good in ["\"abc\"", "W/\"abc\"", "\"x\", W/\"abc\"", "*"] {
            assert!(known(&[good]), "{good}");
        }
        assert!(known(&["\"x\"", "\"abc\""]));
        assert!(!known(&[]) && !known(&["abc"]) && !known(&["w/\"abc\""]) && !known(&["\"x\", \"y\""]));
    }

    #[tokio::test]
    async fn a_probe_with_a_slash_too_many_is_refused() {
        for path in ["/ready/", "/health/", "/metrics/", "/openapi.json/", "/docs/", "/ready/x", "//ready", "/api"] {
            assert_eq!(status(Method::GET, path).await, 404, "{path}");
        }
    }

    #[tokio::test]
    async fn the_root_always_answers_and_paths_of_the_api_never_do() {
        assert_eq!(status(Method::GET, "/").await, 200);
        assert_eq!(status(Method::POST, "/").await, 404);
        assert_eq!(status(Method::GET, "/api/v1/nothing").await, 404);
        assert_eq!(status(Method::GET, "/missing.js").await, 404);
        assert_eq!(status(Method::GET, "/../Cargo.toml").await, 404);
    }
}
