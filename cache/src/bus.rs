//! Messages from node to node over Redis, beside the cache. One that is published while nobody listens is gone.

use crate::config::{CacheError, RedisConfig};
use crate::link::{CONNECT_WITHIN, Inner, LOOK_EVERY, PING_EVERY};
use futures::StreamExt;
use redis::Client;
use redis::aio::{PubSubSink, PubSubStream};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Publishes.
#[derive(Clone)]
pub struct Publisher(pub(crate) Arc<Inner>);

impl Publisher {
    /// The name of a topic, which no other installation has.
    pub fn topic(&self, parts: &[&str]) -> String {
        self.0.key(parts)
    }

    /// Publishes in this order. False where some may be lost.
    pub async fn publish(&self, messages: &[(String, Vec<u8>)]) -> bool {
        let Some(mut connection) = self.0.connection() else { return false };
        let mut pipe = redis::pipe();
        for (topic, payload) in messages {
            pipe.cmd("PUBLISH").arg(topic).arg(payload).ignore();
        }
        match timeout(CONNECT_WITHIN, pipe.exec_async(&mut connection)).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::debug!(%error, "messages for other nodes are lost");
                false
            }
            Err(_) => false,
        }
    }
}

/// What a listener hears.
#[derive(Debug)]
pub enum Heard {
    Message {
        topic: String,
        payload: Vec<u8>,
    },
    /// Redis is there: topics may be subscribed to.
    Connected,
    /// Redis is gone, with all subscriptions. What is said meanwhile is not heard.
    Lost,
}

enum Ask {
    Subscribe(String, oneshot::Sender<()>),
    Unsubscribe(String),
}

/// Listens, for as long as it lives.
pub struct Listener {
    asks: mpsc::UnboundedSender<Ask>,
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener {
    /// Connects to the Redis of `config`, again and again where it must; nothing where none is configured. At most `room`
    /// messages wait to be taken before Redis is told to wait.
    pub fn start(config: &RedisConfig, room: usize) -> Result<Option<(Listener, mpsc::Receiver<Heard>)>, CacheError> {
        Ok(config.client()?.map(|client| Listener::of(client, room)))
    }

    pub(crate) fn of(client: Client, room: usize) -> (Listener, mpsc::Receiver<Heard>) {
        let ((asks, asked), (heard, hears)) = (mpsc::unbounded_channel(), mpsc::channel(room));
        let task = tokio::spawn(keep_listening(client, asked, heard));
        (Listener { asks, task }, hears)
    }

    /// Returns once all that is published to `topic` is heard: false where Redis is gone.
    pub async fn subscribe(&self, topic: &str) -> bool {
        let (done, is_done) = oneshot::channel();
        self.asks.send(Ask::Subscribe(topic.to_owned(), done)).is_ok() && is_done.await.is_ok()
    }

    /// Nothing that is published to `topic` is wanted any more.
    pub fn unsubscribe(&self, topic: &str) {
        _ = self.asks.send(Ask::Unsubscribe(topic.to_owned())); // the task ends with the listener only
    }
}

async fn keep_listening(client: Client, mut asked: mpsc::UnboundedReceiver<Ask>, heard: mpsc::Sender<Heard>) {
    let mut is_lost = false;
    loop {
        match timeout(CONNECT_WITHIN, client.get_async_pubsub()).await {
            Ok(Ok(connection)) => {
                is_lost = false;
                let (sink, stream) = connection.split();
                if heard.send(Heard::Connected).await.is_err() {
                    return;
                }
                listen(sink, stream, &mut asked, &heard).await;
            }
            Ok(Err(error)) => tracing::debug!(%error, "Redis cannot be reached; trying again and again"),
            Err(_) => tracing::debug!("no answer of Redis within {CONNECT_WITHIN:?}; trying again and again"),
        }
        if !std::mem::replace(&mut is_lost, true) && heard.send(Heard::Lost).await.is_err() {
            return;
        }
        // whoever asked meanwhile is told by what is dropped here
        while asked.try_recv().is_ok() {}
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Returns once nothing can be heard any more.
async fn listen(
    mut sink: PubSubSink,
    mut stream: PubSubStream,
    asked: &mut mpsc::UnboundedReceiver<Ask>,
    heard: &mpsc::Sender<Heard>,
) {
    loop {
        let said = tokio::select! {
            ask = asked.recv() => match ask {
                None => return,
                Some(Ask::Subscribe(topic, done)) => match timeout(CONNECT_WITHIN, sink.subscribe(&topic)).await {
                    Ok(Ok(())) => {
                        _ = done.send(()); // who asked may be gone
                        continue;
                    }
                    _ => return,
                },
                Some(Ask::Unsubscribe(topic)) => match timeout(CONNECT_WITHIN, sink.unsubscribe(&topic)).await {
                    Ok(Ok(())) => continue,
                    _ => return,
                },
            },
            said = timeout(PING_EVERY, stream.next()) => said,
        };
        match said {
            Ok(Some(message)) => {
                let topic = message.get_channel_name().to_owned();
                let payload = message.get_payload_bytes().to_vec();
                if heard.send(Heard::Message { topic, payload }).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            // silence: is it still there?
            Err(_) => match timeout(CONNECT_WITHIN, sink.ping::<redis::Value>()).await {
                Ok(Ok(_)) => {}
                _ => return,
            },
        }
    }
}
