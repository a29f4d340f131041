//! The server: connections within bounds, answers until the last one when it drains.

use crate::config::Config;
use crate::problem::{self, Problem};
use crate::tls::Tls;
use crate::{AppState, edge, routes};
use actors::Part;
use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::header::EXPECT;
use axum::http::{HeaderMap, HeaderName, StatusCode, Version};
use axum::middleware::from_fn;
use axum::routing::get;
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::{Request, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use parking_lot::Mutex;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tower::ServiceExt;

/// A client has this long to send the head of a request.
const HEAD_WAIT: Duration = Duration::from_secs(15);
/// Requests in flight and open sockets have this long to end once the server drains.
const DRAIN: Duration = Duration::from_secs(5);
/// After an error of `accept`, such as no file descriptors, some time must pass for it to go away.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// Clients of a server that is starting wait this long for it,
const SHORT_START: Duration = Duration::from_secs(4);
/// and then come again after this.
const START_WAIT: Duration = Duration::from_secs(1);
/// Requests at the same time on one HTTP/2 connection.
const STREAMS_MAX: u32 = 128;

/// Serves until `shutdown` completes, then drains: takes no new connection, finishes requests in flight, tells
/// WebSocket clients to come back later. Returns within five seconds of that, which leaves
/// time to commit what the system holds.
///
/// Fails only where `metrics_listen` or `listen_tls` of `config` cannot be bound, or has no certificate.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    config: &Config,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    if let Some(address) = config.metrics_listen {
        let listener = TcpListener::bind(address).await?;
        let router = Router::new().route("/metrics", get(routes::prometheus)).with_state(state.clone());
        let closing = state.closing.clone();
        // its connections carry no promise: whoever reads figures asks again
        tokio::spawn(axum::serve(listener, router).with_graceful_shutdown(closing.cancelled_owned()).into_future());
    }
    let router = crate::router(state.clone());
    serve_router(listener, router, config, &state.closing, shutdown).await
}

/// Serves `router` on `listener` and `listen_tls` until `shutdown`, then drains.
pub(crate) async fn serve_router(
    listener: TcpListener,
    router: Router,
    config: &Config,
    closing: &CancellationToken,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let tls = match config.listen_tls {
        None => None,
        Some(address) => {
            let tls = Arc::new(Tls::load(&config.tls).map_err(io::Error::other)?);
            tokio::spawn(tls.clone().watch());
            Some((TcpListener::bind(address).await?, tls))
        }
    };
    let open = answer(&listener, tls.as_ref(), router, config, shutdown).await;
    drop((listener, tls));
    closing.cancel();
    open.end(DRAIN).await;
    Ok(())
}

/// Connections that were open when no new ones were taken any more.
struct Open {
    graceful: GracefulShutdown,
    permits: Arc<Semaphore>,
    permits_max: u32,
}

impl Open {
    /// Finishes requests in flight; what is not done within `within` is cut off.
    async fn end(self, within: Duration) {
        let drained = async {
            self.graceful.shutdown().await;
            // upgraded connections hold their permit until their socket is closed
            _ = self.permits.acquire_many(self.permits_max).await;
        };
        if tokio::time::timeout(within, drained).await.is_err() {
            tracing::warn!(?within, "not all connections ended in time; they are cut off");
        }
    }
}

/// Takes connections, as many at a time as `limits.connections`, and answers them by `router` until `shutdown`.
async fn answer(
    listener: &TcpListener,
    tls: Option<&(TcpListener, Arc<Tls>)>,
    router: Router,
    config: &Config,
    shutdown: impl Future<Output = ()>,
) -> Open {
    let permits_max = u32::try_from(config.limits.connections).unwrap_or(u32::MAX);
    let permits = Arc::new(Semaphore::new(permits_max as usize));
    let graceful = GracefulShutdown::new();
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_WAIT);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX);
    let builder = Arc::new(builder);
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted_tls = async {
            match tls {
                Some((listener, tls)) => listener.accept().await.map(|accepted| (accepted, Some(tls.clone()))),
                None => std::future::pending().await,
            }
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted.map(|accepted| (accepted, None)),
            accepted = accepted_tls => accepted,
            () = &mut shutdown => return Open { graceful, permits, permits_max },
        };
        let ((stream, peer), tls) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            // closed at once: a client sees that it was refused instead of waiting for an answer
            metrics::counter!("tidewatch_connections_refused_total").increment(1);
            continue;
        };
        _ = stream.set_nodelay(true); // slower without, not wrong
        let (builder, watcher) = (builder.clone(), graceful.watcher());
        let service = service(router.clone(), peer, config.trusted_proxies.iter().any(|net| net.contains(&peer.ip())));
        tokio::spawn(async move {
            let stream = match tls {
                None => Stream::Plain(stream),
                Some(tls) => match tls.accept(stream).await {
                    Some(stream) => Stream::Tls(Box::new(stream)),
                    None => return,
                },
            };
            let io = TokioIo::new(Counted { stream, permit });
            let connection = builder.serve_connection_with_upgrades(io, service).into_owned();
            if let Err(error) = watcher.watch(connection).await {
                tracing::debug!(%error, %peer, "a connection ended");
            }
        });
    }
}

/// A server that is not ready yet: it says that it lives, what it waits for, and that clients may come again.
///
/// Ends when it is dropped.
pub struct Starting {
    waits: Waits,
    stop: DropGuard,
    listener: JoinHandle<TcpListener>,
}

/// What a start waits for.
type Waits = Arc<Mutex<Part>>;

impl Starting {
    /// Answers on `listener` until the server is ready. The first seconds clients just wait there, so that a usual start
    /// refuses nobody.
    pub fn serve(listener: TcpListener, config: &Config) -> Starting {
        let waits: Waits = Arc::new(Mutex::new(waiting("log", "is being read")));
        let stop = CancellationToken::new();
        let (router, config, stopped) = (starting_router(waits.clone(), config), config.clone(), stop.clone());
        let listener = tokio::spawn(async move {
            if tokio::time::timeout(SHORT_START, stopped.cancelled()).await.is_ok() {
                return listener;
            }
            let open = answer(&listener, None, router, &config, stopped.cancelled()).await;
            tokio::spawn(open.end(DRAIN)); // none of its answers takes long
            listener
        });
        Starting { waits, stop: stop.drop_guard(), listener }
    }

    /// From now on the start waits for `part`, one that `/ready` lists, because of `why`.
    pub fn waits_for(&self, part: &'static str, why: impl Into<String>) {
        *self.waits.lock() = waiting(part, why);
    }

    /// The listener, on which clients wait meanwhile for the server.
    pub async fn end(self) -> io::Result<TcpListener> {
        drop(self.stop);
        self.listener.await.map_err(io::Error::other)
    }
}

fn waiting(name: &'static str, why: impl Into<String>) -> Part {
    Part { name, ok: false, detail: why.into(), can_wait: false }
}

/// Nothing but `/health` and `/ready` is served: anything else is told to come again.
fn starting_router(waits: Waits, config: &Config) -> Router {
    let all = waits.clone();
    let ready = move || {
        let part = waits.lock().clone();
        std::future::ready(routes::not_ready(std::slice::from_ref(&part), &[part.to_string()]))
    };
    let fallback = move || {
        let detail = format!("the server is starting; {}; try again", *all.lock());
        let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", detail);
        std::future::ready(problem.retry_after(START_WAIT))
    };
    Router::new()
        .route("/health", get(routes::health))
        .route("/ready", get(ready))
        .fallback(fallback)
        .layer(from_fn(problem::document_errors))
        .layer(crate::cors(&config.cors_origins))
        .layer(from_fn(edge::identify))
}

/// How a node says that it serves clients for this one.
pub(crate) const NODE: HeaderName = HeaderName::from_static("x-tidewatch-node");
/// For whom a request is passed on.
pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// In requests of a node that serves clients for this one.
#[derive(Clone, Copy)]
pub(crate) struct FromNode;

/// In requests that nodes passed on, as they say: how many.
#[derive(Clone, Copy)]
pub(crate) struct Nodes(pub(crate) u8);

/// Whose request a proxy passes on: the last address that it names, which is the one it saw itself.
fn forwarded_for(headers: &HeaderMap) -> Option<IpAddr> {
    headers.get_all(FORWARDED_FOR).iter().next_back()?.to_str().ok()?.rsplit(',').next()?.trim().parse().ok()
}

/// The router as hyper calls it, with the client's address in each request. A proxy that `is_trusted` says whose it is.
fn service(
    router: Router,
    peer: SocketAddr,
    is_trusted: bool,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = axum::response::Response,
    Error = std::convert::Infallible,
    Future: Send + 'static,
> + Clone {
    service_fn(move |request: Request<Incoming>| {
        // whoever asks first gets its answer and sends nothing; HTTP/2 tells the client to stop
        let lingers = request.version() < Version::HTTP_2 && !request.headers().contains_key(EXPECT);
        let mut request = request.map(|body| axum::body::Body::new(Whole { body: Some(body), lingers }));
        let client = forwarded_for(request.headers()).filter(|_| is_trusted);
        request.extensions_mut().insert(ConnectInfo(client.map_or(peer, |address| SocketAddr::new(address, 0))));
        if let Some(nodes) = request.headers().get(NODE) {
            let nodes = nodes.to_str().ok().and_then(|nodes| nodes.parse().ok()).unwrap_or(1);
            request.extensions_mut().insert(Nodes(nodes));
            if is_trusted {
                request.extensions_mut().insert(FromNode);
            }
        }
        router.clone().oneshot(request)
    })
}

/// What a client still sends once it is answered is read for so long and so far. Otherwise the connection would end
/// with bytes that nobody took, whereupon the client's system forgets the answer and says that the connection was reset.
const LINGER: Duration = Duration::from_secs(5);
const LINGER_BYTES: usize = 64 << 20;

/// A request's body, which is read to its end even where nobody wants it.
struct Whole {
    body: Option<Incoming>,
    lingers: bool,
}

impl Body for Whole {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| self.lingers && !body.is_end_stream()) else { return };
        tokio::spawn(tokio::time::timeout(LINGER, async move {
            let mut left = LINGER_BYTES;
            while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                let Some(rest) = left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { return };
                left = rest;
            }
        }));
    }
}

/// A connection's bytes, encrypted or not.
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that counts as one for as long as its socket is open, upgraded or not.
pub(crate) struct Counted {
    stream: Stream,
    permit: OwnedSemaphorePermit,
}

impl Counted {
    /// The socket and what it counts as, where it is not encrypted.
    pub(crate) fn into_plain(self) -> Result<(TcpStream, OwnedSemaphorePermit), Box<Counted>> {
        match self.stream {
            Stream::Plain(stream) => Ok((stream, self.permit)),
            Stream::Tls(_) => Err(Box::new(self)),
        }
    }

    /// Bounds what the kernel holds for the client.
    pub(crate) fn bound_send_buffer(&self, bytes: usize) {
        let socket = match &self.stream {
            Stream::Plain(stream) => stream,
            Stream::Tls(stream) => stream.get_ref().0,
        };
        let bounded = socket2::SockRef::from(socket).set_send_buffer_size(bytes);
        if let Err(error) = bounded {
            tracing::debug!(%error, "the send buffer stays as it is");
        }
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_all_that_is_said_of_whose_request_it_is_the_last_counts() {
        let said = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            values.iter().for_each(|value| _ = headers.append(FORWARDED_FOR, value.parse().unwrap()));
            forwarded_for(&headers).map(|address| address.to_string())
        };
        assert_eq!(said(&[]), None);
        assert_eq!(said(&["10.0.0.1, 203.0.113.7"]).as_deref(), Some("203.0.113.7"));
        assert_eq!(said(&["10.0.0.1", "2001:db8::1"]).as_deref(), Some("2001:db8::1"));
        assert_eq!(said(&["203.0.113.7, nobody"]), None);
    }
}
