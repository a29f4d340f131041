//! One client of a node without an engine. What it says goes to the core over a connection of its own, and what the core
//! says to it. A channel begins there too, with the state or what was missed; once the client has everything, the core
//! hands it over to the channel's feed, and takes it back wherever that breaks off.

use super::{CONNECT_WITHIN, Node, pass};
use crate::edge::Origin;
use crate::hub::{Back, Cut, Hub, Offer, Outbox, Remote, Seats};
use crate::problem::Problem;
use crate::socket::peer::{Close, Pending, Talk};
use crate::socket::{Line, refusal, unknown_type, with_reference};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Messages of a client on their way to the core.
const ASKED_MAX: usize = 16;
/// A message of the core is no longer than the largest state and what is around it.
const MESSAGE_BYTES_MAX: usize = 32 << 20;
/// Each connection to the core has a buffer of this size.
const BUFFER_BYTES: usize = 4 << 10;
/// What refers to a request of this node, in place of what refers to one of its client.
const OURS: &str = "node";

type Core = WebSocketStream<MaybeTlsStream<TcpStream>>;

pub(super) struct Relay {
    node: Arc<Node>,
    outbox: Arc<Outbox>,
    origin: Origin,
    /// Of its request what the core knows its page by.
    page: HeaderMap,
    /// What this connection counts as here.
    _seats: Seats,
    line: Option<ToCore>,
}

/// The way to the core.
struct ToCore {
    asks: mpsc::UnboundedSender<Said>,
    /// Messages on their way.
    room: Arc<Semaphore>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

/// What a client says, and its place among what is on its way.
type Said = (String, Option<OwnedSemaphorePermit>);

impl Relay {
    pub(super) fn new(node: Arc<Node>, Line { outbox, seats, origin }: Line, page: HeaderMap) -> Relay {
        Relay { node, outbox, origin, page, _seats: seats, line: None }
    }

    async fn connect(&mut self, token: Option<&str>) -> Result<(), Error> {
        let mut request = format!("{}/api/v1/ws", self.node.core.replacen("http", "ws", 1)).into_client_request()?;
        *request.headers_mut() = pass::signed(std::mem::take(request.headers_mut()), &self.origin);
        request.headers_mut().extend(self.page.clone());
        if let Some(token) = token.and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok()) {
            request.headers_mut().insert(AUTHORIZATION, token);
        }
        let config = WebSocketConfig::default()
            .read_buffer_size(BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        let (core, _) = connect_async_with_config(request, Some(config), true).await?;
        let ((asks, asked), (to_core, leaves)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let ((sink, from_core), (back, backs)) = (core.split(), mpsc::unbounded_channel());
        let client = Client {
            node: self.node.clone(),
            outbox: self.outbox.clone(),
            to_core,
            requests: HashMap::new(),
            followed: HashMap::new(),
            back,
        };
        let is_there = self.node.heard.is_there();
        // apart from reading: the core takes no more while its answers are not taken
        let tasks = [tokio::spawn(client.serve(from_core, asked, backs, is_there)), tokio::spawn(write(sink, leaves))];
        let (room, _tasks) = (Arc::new(Semaphore::new(ASKED_MAX)), tasks.map(AbortOnDropHandle::new));
        self.line = Some(ToCore { asks, room, _tasks });
        Ok(())
    }

    /// Connects to the core where that is not so yet.
    async fn line(&mut self, token: Option<&str>) -> Result<&ToCore, Close> {
        if self.line.is_none() {
            let failed = match tokio::time::timeout(CONNECT_WITHIN, Box::pin(self.connect(token))).await {
                Ok(Ok(())) => None,
                Ok(Err(Error::Http(refused))) => return Err(refused_as(&refused)),
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some(format!("no answer within {CONNECT_WITHIN:?}")),
            };
            if let Some(error) = failed {
                tracing::warn!(error, "the core cannot be reached");
                return Err(Close::TooMany("the node with the engine cannot be reached; try again".to_owned()));
            }
        }
        self.line.as_ref().ok_or(Close::Gone)
    }
}

/// How a client is parted from that the core does not let in.
fn refused_as(refused: &Response<Option<Vec<u8>>>) -> Close {
    let problem = refused.body().as_deref().and_then(|body| serde_json::from_slice::<Value>(body).ok());
    let detail = problem.as_ref().and_then(|problem| problem["detail"].as_str());
    let detail = detail.map_or_else(|| format!("the node with the engine says {}", refused.status()), str::to_owned);
    match refused.status() {
        StatusCode::UNAUTHORIZED => Close::Ended(4001, detail),
        StatusCode::FORBIDDEN => Close::Ended(4003, detail),
        _ => Close::TooMany(detail),
    }
}

impl Talk for Relay {
    const HINTS: bool = true;

    fn hub(&self) -> &Arc<Hub> {
        &self.node.hub
    }

    fn closing(&self) -> &CancellationToken {
        &self.node.closing
    }

    /// The core knows, and ends the connection.
    fn end(&self) -> Option<Option<Instant>> {
        self.line.as_ref().map(|_| None)
    }

    fn leave(&mut self) {
        self.line = None;
    }

    fn refuse(&self, problem: &Problem) {
        self.outbox.reply(&refusal(None, problem).to_string());
    }

    async fn sign_in(&mut self, token: String) -> Result<(), Close> {
        self.line(Some(&token)).await.map(drop)
    }

    async fn check(&mut self) -> Result<(), Close> {
        Ok(())
    }

    async fn on_text(&mut self, text: &str) -> Result<Option<Pending>, Close> {
        let line = self.line(None).await?;
        let place = line.room.clone().acquire_owned().await.map_err(|_| Close::Gone)?;
        _ = line.asks.send((text.to_owned(), Some(place))); // a connection that has ended says why by itself
        Ok(None)
    }
}

/// The workspace and the channel, as the client names them.
type Place = (Option<String>, String);

/// What the client followed before it asked for something else, and up to where: goes on where that is refused.
type Before = (Place, Followed, Option<u64>);

/// What was asked of the core.
enum Asked {
    /// By the client, which refers to it by this.
    Subscribe { workspace: Option<String>, reference: Option<Value>, before: Option<Before> },
    /// The same, no more.
    Unsubscribe { place: Option<Place>, reference: Option<Value>, before: Option<Before> },
    /// For the client, which is not told.
    Again(Place),
    /// That a channel is handed over to its feed.
    Feed,
}

/// A channel that the client follows.
struct Followed {
    epoch: String,
    offer: Offer,
    /// Its feed, once it is listened to, and the number under which the client is attached to it.
    feed: Option<(Arc<Remote>, Option<u64>)>,
}

/// The connection of one client to the core.
struct Client {
    node: Arc<Node>,
    outbox: Arc<Outbox>,
    to_core: mpsc::UnboundedSender<Said>,
    requests: HashMap<u64, Asked>,
    followed: HashMap<Place, Followed>,
    back: mpsc::UnboundedSender<Back>,
}

/// Of a message what says where it belongs.
#[derive(Deserialize)]
struct Head {
    #[serde(rename = "type", default)]
    kind: Value,
    #[serde(default)]
    workspace: Option<Value>,
    #[serde(default)]
    channel: Option<Value>,
}

fn place(workspace: Option<&Value>, channel: Option<&Value>) -> Option<Place> {
    let channel = channel?.as_str()?.to_owned();
    // those of the installation are in no workspace, whatever is said
    let workspace = workspace.and_then(Value::as_str).filter(|_| !channel.starts_with("system/"));
    Some((workspace.map(str::to_owned), channel))
}

impl Client {
    /// Until one side leaves.
    async fn serve(
        mut self,
        mut from_core: SplitStream<Core>,
        mut asked: mpsc::UnboundedReceiver<Said>,
        mut backs: mpsc::UnboundedReceiver<Back>,
        mut is_there: watch::Receiver<bool>,
    ) {
        let end = loop {
            // a client that takes nothing is told nothing more, and the core sees that it does not
            let outbox = self.outbox.clone();
            let said = async {
                outbox.room().await;
                from_core.next().await
            };
            tokio::select! {
                said = said => match said {
                    Some(Ok(Message::Text(text))) => self.on_core(text.as_str()).await,
                    Some(Ok(Message::Close(frame))) => {
                        let end = frame.map(|frame| (u16::from(frame.code), frame.reason.to_string()));
                        break end.unwrap_or((1011, "the node with the engine is gone".to_owned()));
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => break (1012, "the node with the engine is gone; come back".to_owned()),
                },
                said = asked.recv() => match said {
                    Some(said) => {
                        self.on_client(said);
                        continue;
                    }
                    None => break (1000, String::new()),
                },
                Some(back) = backs.recv() => self.on_back(back),
                Ok(()) = is_there.changed() => {
                    let is_there = *is_there.borrow_and_update();
                    if is_there {
                        self.join_all().await;
                    }
                }
            }
        };
        self.outbox.cut(Cut::Ended(end.0, end.1));
    }

    fn tell(&self, text: String, place: Option<OwnedSemaphorePermit>) {
        _ = self.to_core.send((text, place)); // when nobody writes any more, reading says so too
    }

    /// Asks the core something, of which the answer is looked at here.
    fn ask(&mut self, mut request: Value, place: Option<OwnedSemaphorePermit>, asked: Asked) {
        let number = self.node.hub.next_id();
        request["ref"] = json!({OURS: number});
        self.requests.insert(number, asked);
        self.tell(request.to_string(), place);
    }

    fn on_client(&mut self, (text, room): Said) {
        let Ok(head) = serde_json::from_str::<Head>(&text) else { return self.tell(text, room) };
        let kind = head.kind.as_str().unwrap_or_default();
        if !matches!(kind, "subscribe" | "unsubscribe" | "feed") {
            return self.tell(text, room);
        }
        let Ok(Value::Object(mut request)) = serde_json::from_str(&text) else { return self.tell(text, room) };
        let reference = request.remove("ref");
        if kind == "feed" {
            // what nodes ask is not for clients
            return self.outbox.reply(&refusal(reference.as_ref(), &unknown_type(kind)).to_string());
        }
        let place = place(head.workspace.as_ref(), head.channel.as_ref());
        let before = place.clone().and_then(|place| {
            let followed = self.followed.remove(&place)?;
            let offset = detach(&followed, &self.outbox);
            Some((place, followed, offset))
        });
        let asked = match kind {
            "subscribe" => {
                let workspace = place.and_then(|(workspace, _)| workspace);
                Asked::Subscribe { workspace, reference, before }
            }
            _ => Asked::Unsubscribe { place, reference, before },
        };
        self.ask(request.into(), room, asked);
    }

    /// Goes on with what the client followed: what it asked for instead was refused.
    fn restore(&mut self, before: Option<Before>) {
        let Some((place, followed, offset)) = before else { return };
        if followed.feed.is_some() && offset.is_none() {
            // it was between the core and the feed: nobody knows where
            let why = format!("nobody knows where {} stands; resume with `since`", place.1);
            return self.outbox.cut(Cut::TooSlow(why));
        }
        self.followed.insert(place.clone(), followed);
        if let Some(offset) = offset {
            self.again(place, offset);
        }
    }

    async fn on_core(&mut self, text: &str) {
        // most messages: the core writes their type first
        if text.starts_with("{\"type\":\"event\"") {
            return self.outbox.reply(text);
        }
        let Ok(Value::Object(said)) = serde_json::from_str(text) else { return self.outbox.reply(text) };
        let number = said.get("ref").and_then(|reference| reference.get(OURS)).and_then(Value::as_u64);
        if let Some(asked) = number.and_then(|number| self.requests.remove(&number)) {
            return self.on_answer(asked, said).await;
        }
        let place = place(said.get("workspace"), said.get("channel"));
        match (said.get("type").and_then(Value::as_str), place) {
            (Some("fed"), Some(place)) => {
                return self.attach(place, said.get("offset").and_then(Value::as_u64).unwrap_or(0));
            }
            // one that is taken from the client
            (Some("error"), Some(place)) => {
                self.forget(&place);
            }
            _ => {}
        }
        self.outbox.reply(text);
    }

    fn forget(&mut self, place: &Place) {
        if let Some(followed) = self.followed.remove(place) {
            _ = detach(&followed, &self.outbox);
        }
    }

    async fn on_answer(&mut self, asked: Asked, mut said: Map<String, Value>) {
        let is_ok = said.get("type").is_some_and(|kind| kind == "ok");
        let offer = said.remove("feed").and_then(|offer| serde_json::from_value::<Offer>(offer).ok());
        let text = |name: &str| said.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (epoch, channel) = (text("epoch"), text("channel"));
        let told = |mut said: Map<String, Value>, reference: Option<Value>| {
            said.remove("ref");
            self.outbox.reply(&with_reference(reference.as_ref(), said.into()).to_string());
        };
        let place = match asked {
            Asked::Feed => return,
            Asked::Unsubscribe { place, reference, before } => {
                let is_over = is_ok || said.get("code").is_some_and(|code| code == "not_subscribed");
                told(said, reference);
                match place {
                    // also where an earlier request for it was answered meanwhile
                    Some(place) if is_over => self.forget(&place),
                    _ => self.restore(before),
                }
                return;
            }
            Asked::Subscribe { workspace, reference, before } => {
                told(said, reference);
                if !is_ok {
                    return self.restore(before);
                }
                (workspace, channel)
            }
            Asked::Again(place) if !is_ok => {
                self.followed.remove(&place);
                // as the core says that something is taken from a client
                let (workspace, channel) = place;
                said.insert("workspace".to_owned(), workspace.into());
                said.insert("channel".to_owned(), channel.into());
                return told(said, None);
            }
            Asked::Again(place) => {
                // the client has let go of it meanwhile
                let Some(followed) = self.followed.get(&place) else { return };
                if said.get("recovered") == Some(&Value::Bool(false)) && !followed.offer.is_state() {
                    let why = format!("some messages of {} are gone; resume with `since`", place.1);
                    return self.outbox.cut(Cut::TooSlow(why));
                }
                place
            }
        };
        if let Some(offer) = offer {
            // of several answers for one channel the last counts, as for the core
            if let Some(known) = self.followed.insert(place.clone(), Followed { epoch, offer, feed: None }) {
                _ = detach(&known, &self.outbox);
            }
            self.join(place).await;
        }
    }

    /// Has a channel handed over to its feed, where that can be listened to.
    async fn join(&mut self, place: Place) {
        let Some(followed) = self.followed.get_mut(&place) else { return };
        let (workspace, channel) = &place;
        let joined = self.node.heard.join(&followed.offer, (workspace.as_deref(), channel), &followed.epoch).await;
        let Some(feed) = joined else { return };
        followed.feed = Some((feed, None));
        let request = json!({"type": "feed", "workspace": workspace, "channel": channel});
        self.ask(request, None, Asked::Feed);
    }

    /// Redis is there again: whatever comes from the core may come over it.
    async fn join_all(&mut self) {
        let all: Vec<Place> = (self.followed.iter())
            .filter(|(_, followed)| followed.feed.is_none())
            .map(|(place, _)| place.clone())
            .collect();
        for place in all {
            self.join(place).await;
        }
    }

    /// The client has everything up to `offset`, and the rest is published.
    fn attach(&mut self, place: Place, offset: u64) {
        let id = self.node.hub.next_id();
        match self.followed.get_mut(&place) {
            None => {} // it was let go of meanwhile
            Some(Followed { feed: Some((_, Some(_))), .. }) => {}
            Some(Followed { feed: Some((feed, attached)), .. })
                if feed.attach(id, &self.outbox, offset, self.back.clone()) =>
            {
                *attached = Some(id);
            }
            Some(_) => self.again(place, offset),
        }
    }

    /// A feed broke off, or the client is too far behind it.
    fn on_back(&mut self, Back { id, offset }: Back) {
        let is_it = |followed: &Followed| matches!(followed.feed, Some((_, Some(attached))) if attached == id);
        let place = self.followed.iter().find(|(_, followed)| is_it(followed)).map(|(place, _)| place.clone());
        if let Some(place) = place {
            self.outbox.remove(id);
            self.again(place, offset);
        }
    }

    /// Goes on behind `offset` with what the core has, as a client would that comes back.
    fn again(&mut self, place: Place, offset: u64) {
        let Some(followed) = self.followed.get_mut(&place) else { return };
        followed.feed = None;
        let since = json!({"epoch": followed.epoch, "offset": offset});
        let request = json!({"type": "subscribe", "workspace": place.0, "channel": place.1, "since": since});
        self.ask(request, None, Asked::Again(place));
    }
}

impl Drop for Client {
    /// However it ends.
    fn drop(&mut self) {
        for followed in self.followed.values() {
            _ = detach(followed, &self.outbox);
        }
    }
}

/// Lets go of a feed: up to where the client has everything, where it is attached.
fn detach(followed: &Followed, outbox: &Outbox) -> Option<u64> {
    match &followed.feed {
        Some((feed, Some(id))) => feed.detach(*id, outbox),
        _ => None,
    }
}

/// Writes to the core what is said, in its order.
async fn write(mut sink: SplitSink<Core, Message>, mut leaves: mpsc::UnboundedReceiver<Said>) {
    while let Some((text, _place)) = leaves.recv().await {
        if sink.send(Message::Text(text.into())).await.is_err() {
            return; // reading says so too
        }
    }
}
