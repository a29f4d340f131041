//! Bodies with events: read within bounds, decompressed within bounds, decoded off the event loop when large.

use crate::AppState;
use crate::config::Limits;
use crate::edge::Told;
use crate::extract::{Member, announced};
use crate::problem::Problem;
use crate::quota::Tier;
use actors::Ingested;
use actors::agent::AGENT_EVENTS;
use actors::background::{Background, pause};
use axum::body::Body;
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use engine::event::{StreamName, WorkspaceId};
use futures::StreamExt;
use serde_json::{Value, json};
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;
use streams::decode::{Bounds, Decoded, Format, TsUnit, decode};
use streams::table::Table;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of request bodies in memory at the same time, over all connections.
const IN_FLIGHT_BYTES: usize = 256 << 20;
/// Large bodies that are decompressed and decoded at the same time: each may take `limits.decompressed_bytes`.
const DECODING: usize = 4;
/// Bodies larger than this are decoded off the event loop: beyond it, others would wait noticeably.
const INLINE_BYTES: usize = 256 << 10;
/// The same for those that gzip may have made a thousandth of.
const INLINE_GZIP_BYTES: usize = 4 << 10;
/// This much is decompressed in a tenth of a millisecond or two.
const UNPACKED_BYTES: usize = 64 << 10;
/// Each part of a body must come within this time.
const PART_WAIT: Duration = Duration::from_secs(30);
/// Windows of zstd beyond 2^this bytes are refused: the decoder allocates them whole.
const ZSTD_WINDOW_LOG_MAX: u32 = 25;

/// What all requests share so that together they stay within bounds.
pub(crate) struct Intake {
    in_flight: Arc<Semaphore>,
    decoding: Arc<Semaphore>,
    decoders: Background,
}

impl Intake {
    pub(crate) fn start() -> std::io::Result<Intake> {
        let (in_flight, decoding) = (Arc::new(Semaphore::new(IN_FLIGHT_BYTES)), Arc::new(Semaphore::new(DECODING)));
        Ok(Intake { in_flight, decoding, decoders: Background::start("decode", DECODING)? })
    }
}

/// How a body is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Encoding {
    Identity,
    Gzip,
    Zstd,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> Result<Encoding, Problem> {
        let Some(name) = headers.get(CONTENT_ENCODING) else { return Ok(Encoding::Identity) };
        match name.as_bytes().trim_ascii().to_ascii_lowercase().as_slice() {
            b"" | b"identity" => Ok(Encoding::Identity),
            b"gzip" | b"x-gzip" => Ok(Encoding::Gzip),
            b"zstd" => Ok(Encoding::Zstd),
            _ => Err(Problem::unsupported_type("content-encoding must be gzip, zstd or absent")),
        }
    }
}

fn format_of(headers: &HeaderMap) -> Result<Format, Problem> {
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match essence.as_str() {
        "application/x-ndjson" | "application/ndjson" | "application/jsonl" => Ok(Format::Ndjson),
        "application/json" => Ok(Format::Json),
        "application/vnd.apache.arrow.stream" => Ok(Format::Arrow),
        _ => Err(Problem::unsupported_type(
            "content-type must be application/x-ndjson, application/json or application/vnd.apache.arrow.stream",
        )),
    }
}

/// Refuses a stream that only the engine writes: what is in it can be believed.
fn check_open(stream: &StreamName) -> Result<(), Problem> {
    if stream.as_str() != AGENT_EVENTS {
        return Ok(());
    }
    let detail = format!("stream `{stream}` is written by the engine alone; send your events to a stream of your own");
    Err(Problem::conflict("engine_stream", detail))
}

/// Takes in the events of a request; answers once the good ones are durable. How the events of the workspace stand is
/// told before and behind them.
pub(crate) async fn take_body(
    state: &AppState,
    member: &Member,
    stream: &StreamName,
    unit: TsUnit,
    (headers, body): (&HeaderMap, Body),
    told: &Told,
) -> Result<Value, Problem> {
    check_open(stream)?;
    let tier = state.tier(&member.workspace).await?;
    let tell = || _ = state.quotas.events(&member.workspace, &tier, state.system.now()).map(|s| told.tell(s));
    tell();
    state.quotas.may_ingest(&member.workspace, &tier, state.system.now())?;
    let (format, encoding) = (format_of(headers)?, Encoding::of(headers)?);
    // before the body is read: a stream that is not there needs none
    state.system.schema(&member.workspace, stream).await?;
    let limits = &state.config.limits;
    let (body, _held) = state.intake.read(headers, body, limits.body_bytes).await?;
    let large = is_large(&body, format, encoding);
    let _turn = if large { Some(state.intake.turn().await?) } else { None };
    let decoded = decode_body(state, member, stream, unit, format, encoding, body, large).await?;
    let answer = take(state, &member.workspace, stream, &tier, decoded).await?;
    tell();
    Ok(answer)
}

/// Counts events that were decoded, and takes them in: the answer, once the good ones are durable.
pub(crate) async fn take(
    state: &AppState,
    workspace: &WorkspaceId,
    stream: &StreamName,
    tier: &Tier,
    decoded: Decoded,
) -> Result<Value, Problem> {
    let counted = Counted::new(state, workspace, tier, &decoded)?;
    let done = state.system.ingest(workspace, stream, decoded).await?;
    Ok(counted.taken(&done))
}

/// Events that count against the rate of their workspace unless they are not taken in.
struct Counted<'a> {
    state: &'a AppState,
    workspace: &'a WorkspaceId,
    tier: &'a Tier,
    events: usize,
}

impl<'a> Counted<'a> {
    fn new(
        state: &'a AppState,
        workspace: &'a WorkspaceId,
        tier: &'a Tier,
        decoded: &Decoded,
    ) -> Result<Counted<'a>, Problem> {
        let events = decoded.batch.num_rows() + decoded.rejected;
        state.quotas.ingest(workspace, tier, events, state.system.now())?;
        Ok(Counted { state, workspace, tier, events })
    }

    fn taken(mut self, done: &Ingested) -> Value {
        self.events = 0;
        answer(done)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.state.quotas.give_back(self.workspace, self.tier, self.events);
    }
}

/// Whether a body is to be decoded elsewhere. Zstandard, which buffers of Arrow may be packed with too, makes a hundred
/// kilobytes of four.
fn is_large(body: &Bytes, format: Format, encoding: Encoding) -> bool {
    match (format, encoding) {
        (Format::Arrow, _) | (_, Encoding::Zstd) => true,
        (_, Encoding::Gzip) => body.len() > INLINE_GZIP_BYTES,
        (_, Encoding::Identity) => body.len() > INLINE_BYTES,
    }
}

fn bounds(limits: &Limits) -> Bounds {
    let Limits { event_bytes, decompressed_bytes, .. } = *limits;
    Bounds { event_bytes, unpacked_bytes: decompressed_bytes, pause, ..Bounds::default() }
}

/// Takes in changes of a reference table's rows; answers once the good ones are durable.
pub(crate) async fn take_rows(
    state: &AppState,
    member: &Member,
    table: &Arc<Table>,
    unit: TsUnit,
    headers: &HeaderMap,
    body: Body,
) -> Result<Value, Problem> {
    let tier = state.tier(&member.workspace).await?;
    state.quotas.may_ingest(&member.workspace, &tier, state.system.now())?;
    let (format, encoding) = (format_of(headers)?, Encoding::of(headers)?);
    if format == Format::Arrow {
        return Err(Problem::unsupported_type("content-type must be application/x-ndjson or application/json"));
    }
    let limits = state.config.limits;
    let (body, _held) = state.intake.read(headers, body, limits.body_bytes).await?;
    let large = is_large(&body, format, encoding);
    let _turn = if large { Some(state.intake.turn().await?) } else { None };
    let (now, decoder) = (state.system.now(), table.clone());
    let work = move || -> Result<Decoded, Problem> {
        let body = unpack(body, encoding, &limits)?;
        let bounds = bounds(&limits);
        Ok(decoder.decode(&body, format, unit, &bounds, now)?)
    };
    let decoded = if large { state.intake.decode(work).await } else { work() }?;
    let counted = Counted::new(state, &member.workspace, &tier, &decoded)?;
    let done = state.system.change_rows(&member.workspace, table.name(), decoded).await?;
    Ok(counted.taken(&done))
}

/// Decodes events that came in a frame: one JSON object or an array of them.
pub(crate) async fn decode_frame(
    state: &AppState,
    member: &Member,
    stream: &StreamName,
    tier: &Tier,
    events: Bytes,
) -> Result<Decoded, Problem> {
    check_open(stream)?;
    state.quotas.may_ingest(&member.workspace, tier, state.system.now())?;
    let large = events.len() > INLINE_BYTES;
    let (format, encoding) = (Format::Json, Encoding::Identity);
    decode_body(state, member, stream, TsUnit::default(), format, encoding, events, large).await
}

#[expect(clippy::too_many_arguments, reason = "how a body is packed, written and counted are different things")]
async fn decode_body(
    state: &AppState,
    member: &Member,
    stream: &StreamName,
    unit: TsUnit,
    format: Format,
    encoding: Encoding,
    body: Bytes,
    large: bool,
) -> Result<Decoded, Problem> {
    let schema = state.system.schema(&member.workspace, stream).await?;
    let limits = state.config.limits;
    let now = state.system.now();
    let work = move || {
        let body = unpack(body, encoding, &limits)?;
        let bounds = bounds(&limits);
        Ok(decode(&schema, &body, format, unit, &bounds, now)?)
    };
    if large { state.intake.decode(work).await } else { work() }
}

impl Intake {
    /// The whole body, and what it holds of the memory for bodies.
    async fn read(
        &self,
        headers: &HeaderMap,
        body: Body,
        most: usize,
    ) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Problem> {
        let over =
            || Problem::too_large(format!("the body is larger than limits.body_bytes = {most}; send less at a time"));
        if announced(headers).is_some_and(|bytes| bytes > most as u64) {
            return Err(over());
        }
        let mut parts: Vec<Bytes> = Vec::new();
        let (mut bytes, mut held) = (0, None::<OwnedSemaphorePermit>);
        let mut body = body.into_data_stream();
        let slow = |_| {
            let detail = format!("nothing of the body came for {} s", PART_WAIT.as_secs());
            Problem::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", detail)
        };
        while let Some(part) = tokio::time::timeout(PART_WAIT, body.next()).await.map_err(slow)? {
            let part =
                part.map_err(|_| Problem::invalid("unreadable_body", "the body ended before it was complete"))?;
            bytes += part.len();
            if bytes > most {
                return Err(over());
            }
            let permit = self.in_flight.clone().try_acquire_many_owned(part.len() as u32).map_err(|_| busy())?;
            match &mut held {
                Some(held) => held.merge(permit),
                None => held = Some(permit),
            }
            parts.push(part);
        }
        let body = match parts.as_slice() {
            [whole] => whole.clone(),
            parts => parts.concat().into(),
        };
        Ok((body, held))
    }

    async fn decode<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        self.decoders.run(work).await.map_err(Problem::internal)?
    }

    async fn turn(&self) -> Result<OwnedSemaphorePermit, Problem> {
        self.decoding.clone().acquire_owned().await.map_err(Problem::internal)
    }
}

fn busy() -> Problem {
    let detail = "too many requests with large bodies at once; try again in a moment";
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "backpressure", detail).retry_after(Duration::from_secs(1))
}

/// The body as it was before it was compressed.
fn unpack(body: Bytes, encoding: Encoding, limits: &Limits) -> Result<Bytes, Problem> {
    let broken = |error: std::io::Error| {
        Problem::invalid("bad_encoding", format!("the body is not what its content-encoding says: {error}"))
    };
    let most = limits.decompressed_bytes;
    let mut out = Vec::new();
    let read = |reader: &mut dyn Read, out: &mut Vec<u8>| -> std::io::Result<()> {
        while out.len() <= most
            && (&mut *reader).take(UNPACKED_BYTES.min(most + 1 - out.len()) as u64).read_to_end(out)? > 0
        {
            pause();
        }
        Ok(())
    };
    match encoding {
        Encoding::Identity => return Ok(body),
        Encoding::Gzip => read(&mut flate2::read::MultiGzDecoder::new(body.as_ref()), &mut out).map_err(broken)?,
        Encoding::Zstd => {
            let mut reader = zstd::stream::read::Decoder::new(body.as_ref()).map_err(broken)?;
            reader.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(broken)?;
            read(&mut reader, &mut out).map_err(broken)?
        }
    };
    if out.len() > most {
        let detail = format!("the body is larger than limits.decompressed_bytes = {most} once decompressed");
        return Err(Problem::too_large(detail));
    }
    Ok(out.into())
}

/// The answer to an ingest, as the contract shows it.
fn answer(done: &Ingested) -> Value {
    let errors: Vec<Value> = done
        .errors
        .iter()
        .map(|error| json!({"index": error.index, "code": error.code, "detail": error.detail}))
        .collect();
    json!({
        "accepted": done.accepted, "duplicates": done.duplicates, "rejected": done.rejected,
        "errors": errors, "offset": done.offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::header::CONTENT_LENGTH;
    use std::io::Write;

    fn limits(decompressed_bytes: usize) -> Limits {
        Limits { decompressed_bytes, ..Limits::default() }
    }

    fn gzip(text: &[u8]) -> Bytes {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        writer.write_all(text).unwrap();
        writer.finish().unwrap().into()
    }

    #[test]
    fn a_compressed_body_is_read_up_to_its_decompressed_bound() {
        let text = vec![b'a'; 1000];
        for (encoding, body) in [
            (Encoding::Identity, Bytes::from(text.clone())),
            (Encoding::Gzip, gzip(&text)),
            (Encoding::Zstd, zstd::encode_all(text.as_slice(), 3).unwrap().into()),
        ] {
            assert_eq!(unpack(body.clone(), encoding, &limits(1000)).unwrap(), text, "{encoding:?}");
            if encoding != Encoding::Identity {
                let refused = unpack(body, encoding, &limits(999)).unwrap_err();
                assert_eq!((refused.status().as_u16(), refused.code), (413, "body_too_large"));
            }
        }
    }

    #[test]
    fn a_body_that_is_not_what_it_says_is_refused() {
        for encoding in [Encoding::Gzip, Encoding::Zstd] {
            let refused = unpack(Bytes::from_static(b"{}"), encoding, &limits(1000)).unwrap_err();
            assert_eq!((refused.status().as_u16(), refused.code), (400, "bad_encoding"));
        }
        let mut cut = gzip(b"hello hello hello").to_vec();
        cut.truncate(cut.len() - 9);
        assert_eq!(unpack(cut.into(), Encoding::Gzip, &limits(1000)).unwrap_err().code, "bad_encoding");
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused_announced_or_not() {
        let intake = Intake::start().unwrap();
        let mut headers = HeaderMap::new();
        let (body, held) = intake.read(&headers, Body::from("12345"), 5).await.unwrap();
        assert_eq!((body.as_ref(), held.unwrap().num_permits()), (b"12345".as_slice(), 5));
        assert_eq!(intake.read(&headers, Body::from("123456"), 5).await.unwrap_err().code, "body_too_large");
        headers.insert(CONTENT_LENGTH, 6.into());
        assert_eq!(intake.read(&headers, Body::empty(), 5).await.unwrap_err().code, "body_too_large");
        assert_eq!(intake.in_flight.available_permits(), IN_FLIGHT_BYTES);
    }

    #[test]
    fn types_are_read_with_parameters_and_unknown_ones_are_415() {
        let typed = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, text.parse().unwrap());
            format_of(&headers)
        };
        assert_eq!(typed("application/json; charset=utf-8").unwrap(), Format::Json);
        assert_eq!(typed("Application/X-NDJSON").unwrap(), Format::Ndjson);
        assert_eq!(typed("application/vnd.apache.arrow.stream").unwrap(), Format::Arrow);
        assert_eq!(typed("text/plain").unwrap_err().status().as_u16(), 415);
        assert_eq!(format_of(&HeaderMap::new()).unwrap_err().status().as_u16(), 415);
    }
}
