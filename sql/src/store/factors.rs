//! Second factors, and users as other issuers know them. Secrets come sealed and stay so.

use super::db::{FromRow, Row, Scope, query, query_as, query_scalar};
use super::users::revoke_families;
use super::{Store, StoreError, User, failed};
use engine::event::Micros;

/// The second factor of a user.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totp {
    /// Sealed secret that sign-ins ask for; `None`: they ask for no code.
    pub secret: Option<String>,
    /// Sealed secret that was shown and not yet confirmed.
    pub pending: Option<String>,
}

impl FromRow for Totp {
    fn from_row(row: &Row) -> Result<Totp, sqlx::Error> {
        Ok(Totp { secret: row.try_get("secret")?, pending: row.try_get("pending")? })
    }
}

impl Store {
    /// A user's second factor; empty for a user who has none.
    pub async fn totp(&self, user: &str) -> Result<Totp, StoreError> {
        let found = query_as("SELECT secret, pending FROM totp WHERE user_id = $1")
            .bind(user)
            .fetch_optional(self.read(Scope::Installation))
            .await
            .map_err(failed("read second factor"))?;
        Ok(found.unwrap_or_default())
    }

    /// Keeps a sealed secret until it is confirmed; one that is in force stays so until then.
    pub async fn put_totp(&self, user: &str, pending: &str) -> Result<(), StoreError> {
        query(
            "INSERT INTO totp (user_id, pending, step) VALUES ($1, $2, 0) \
             ON CONFLICT (user_id) DO UPDATE SET pending = excluded.pending",
        )
        .bind(user)
        .bind(pending)
        .execute(self.write(Scope::Installation))
        .await
        .map_err(failed("put second factor"))?;
        Ok(())
    }

    /// Puts the pending secret in force with the code of `step` spent: whether `pending` is still the one there is.
    pub async fn confirm_totp(&self, user: &str, pending: &str, step: i64) -> Result<bool, StoreError> {
        let confirmed =
            query("UPDATE totp SET secret = pending, pending = NULL, step = $3 WHERE user_id = $1 AND pending = $2")
                .bind(user)
                .bind(pending)
                .bind(step)
                .execute(self.write(Scope::Installation))
                .await
                .map_err(failed("confirm second factor"))?;
        Ok(confirmed > 0)
    }

    /// Spends the code of a time step: `false` where it, or a later one, was spent before. Of any number of attempts at
    /// the same time one succeeds.
    pub async fn spend_totp(&self, user: &str, step: i64) -> Result<bool, StoreError> {
        let spent = query("UPDATE totp SET step = $2 WHERE user_id = $1 AND step < $2")
            .bind(user)
            .bind(step)
            .execute(self.write(Scope::Installation))
            .await
            .map_err(failed("spend second factor"))?;
        Ok(spent > 0)
    }

    /// Sign-ins ask for no code any more: whether they did, or would have.
    pub async fn delete_totp(&self, user: &str) -> Result<bool, StoreError> {
        let deleted = query("DELETE FROM totp WHERE user_id = $1")
            .bind(user)
            .execute(self.write(Scope::Installation))
            .await
            .map_err(failed("delete second factor"))?;
        Ok(deleted > 0)
    }

    /// All sealed secrets, for a new key to seal them again: user, secret in force, pending one.
    pub async fn all_totp(&self) -> Result<Vec<(String, Totp)>, StoreError> {
        let rows = query("SELECT user_id, secret, pending FROM totp").fetch_all(self.read(Scope::Installation)).await;
        let rows = rows.map_err(failed("list second factors"))?;
        let read = |row: &Row| Ok((row.try_get("user_id")?, Totp::from_row(row)?));
        rows.iter().map(read).collect::<Result<_, _>>().map_err(failed("list second factors"))
    }

    /// Replaces sealed secrets by the same ones sealed anew: whether `old` is still what there is.
    pub async fn reseal_totp(&self, user: &str, old: &Totp, new: &Totp) -> Result<bool, StoreError> {
        let changed = query(
            "UPDATE totp SET secret = $4, pending = $5 WHERE user_id = $1 \
             AND coalesce(secret, '') = $2 AND coalesce(pending, '') = $3",
        )
        .bind(user)
        .bind(old.secret.as_deref().unwrap_or_default())
        .bind(old.pending.as_deref().unwrap_or_default())
        .bind(&new.secret)
        .bind(&new.pending)
        .execute(self.write(Scope::Installation))
        .await
        .map_err(failed("reseal second factor"))?;
        Ok(changed > 0)
    }

    /// The user whom `issuer` knows as `subject`.
    pub async fn user_by_identity(&self, issuer: &str, subject: &str) -> Result<Option<User>, StoreError> {
        query_as("SELECT u.* FROM identities i JOIN users u ON u.id = i.user_id WHERE i.issuer = $1 AND i.subject = $2")
            .bind(issuer)
            .bind(subject)
            .fetch_optional(self.read(Scope::Installation))
            .await
            .map_err(failed("read identity"))
    }

    /// Remembers `user` as whom `issuer` knows as `subject`: whether that holds now. The first time stands, for the
    /// subject and for the user: an issuer knows nobody as two.
    pub async fn put_identity(&self, issuer: &str, subject: &str, user: &str, at: Micros) -> Result<bool, StoreError> {
        async {
            let mut tx = self.db.begin(Scope::Installation).await?;
            // one at a time for a user: on PostgreSQL two that do not see each other yet would both be the first
            query("UPDATE users SET email = email WHERE id = $1").bind(user).execute(&mut tx).await?;
            let known: Vec<String> = query_scalar("SELECT subject FROM identities WHERE issuer = $1 AND user_id = $2")
                .bind(issuer)
                .bind(user)
                .fetch_all(&mut tx)
                .await?;
            if !known.is_empty() {
                return Ok(known.iter().any(|known| known == subject));
            }
            let put = query(
                "INSERT INTO identities (issuer, subject, user_id, created_at) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (issuer, subject) DO NOTHING",
            );
            let put = put.bind(issuer).bind(subject).bind(user).bind(at).execute(&mut tx).await?;
            tx.commit().await?;
            Ok(put > 0)
        }
        .await
        .map_err(failed("put identity"))
    }

    /// Forgets as whom issuers know a user, and ends every sign-in: whether there was an issuer that did.
    pub async fn delete_identities(&self, user: &str) -> Result<bool, StoreError> {
        async {
            let mut tx = self.db.begin(Scope::Installation).await?;
            let deleted = query("DELETE FROM identities WHERE user_id = $1").bind(user).execute(&mut tx).await?;
            if deleted > 0 {
                revoke_families(&mut tx, user).await?;
            }
            tx.commit().await?;
            Ok(deleted > 0)
        }
        .await
        .map_err(failed("delete identities"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[tokio::test]
    async fn a_second_factor_counts_once_it_is_confirmed_and_each_step_once() {
        let (store, _dir) = store().await;
        add_user(&store, "ann").await;
        assert_eq!(store.totp("ann").await.unwrap(), Totp::default());
        store.put_totp("ann", "one").await.unwrap();
        assert!(!store.confirm_totp("ann", "other", 7).await.unwrap());
        assert!(store.confirm_totp("ann", "one", 7).await.unwrap());
        assert_eq!(store.totp("ann").await.unwrap(), Totp { secret: Some("one".into()), pending: None });
        assert!(!store.spend_totp("ann", 7).await.unwrap());
        assert!(store.spend_totp("ann", 8).await.unwrap() && !store.spend_totp("ann", 8).await.unwrap());
        store.put_totp("ann", "two").await.unwrap();
        let both = Totp { secret: Some("one".into()), pending: Some("two".into()) };
        assert_eq!(store.all_totp().await.unwrap(), [("ann".to_owned(), both.clone())]);
        let sealed = Totp { secret: Some("1".into()), pending: Some("2".into()) };
        assert!(store.reseal_totp("ann", &both, &sealed).await.unwrap());
        assert!(!store.reseal_totp("ann", &both, &sealed).await.unwrap());
        assert!(store.delete_totp("ann").await.unwrap() && !store.delete_totp("ann").await.unwrap());
        assert!(matches!(store.put_totp("nobody", "x").await, Err(StoreError::Missing { .. })));
    }

    #[tokio::test]
    async fn an_identity_is_one_user_for_good_and_an_issuer_knows_a_user_as_one() {
        let (store, _dir) = store().await;
        add_user(&store, "ann").await;
        add_user(&store, "bob").await;
        let who = async || store.user_by_identity("https://id", "42").await.unwrap().map(|user| user.id);
        assert_eq!(who().await, None);
        let put = async |issuer, subject, user| store.put_identity(issuer, subject, user, Micros(1)).await.unwrap();
        assert!(put("https://id", "42", "ann").await && put("https://id", "42", "ann").await);
        assert!(!put("https://id", "42", "bob").await, "the subject is somebody else");
        assert!(!put("https://id", "43", "ann").await, "the user is another subject");
        assert!(put("https://elsewhere", "43", "ann").await);
        assert_eq!(who().await.as_deref(), Some("ann"));
        let token = super::super::RefreshToken {
            token_hash: "hash".into(),
            family: "family".into(),
            user: "ann".into(),
            issued_at: Micros(1),
            expires_at: Micros(9),
        };
        store.insert_refresh(&token).await.unwrap();
        assert!(store.delete_identities("ann").await.unwrap() && !store.delete_identities("ann").await.unwrap());
        assert!(store.family_revoked("family").await.unwrap());
        assert!(put("https://id", "43", "ann").await, "whoever comes next");
    }
}
