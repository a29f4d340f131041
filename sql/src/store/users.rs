//! Users, and the refresh tokens of their sign-ins.

use super::db::{FromRow, On, Row, Scope, Tx, query, query_as, query_scalar};
use super::record::Columns;
use super::{Store, StoreError, failed};
use engine::event::{Micros, Span};

/// Somebody who can sign in.
#[derive(Clone, Debug, PartialEq)]
pub struct User {
    pub id: String,
    /// Kept and compared in lower case.
    pub email: String,
    /// PHC string.
    pub password_hash: String,
    /// May administer the whole installation, whatever the workspace roles.
    pub admin: bool,
    pub created_at: Micros,
}

/// A refresh token: good for one renewal. All tokens renewed from one sign-in are a family.
#[derive(Clone, Debug, PartialEq)]
pub struct RefreshToken {
    pub token_hash: String,
    pub family: String,
    /// Id of the user.
    pub user: String,
    pub issued_at: Micros,
    pub expires_at: Micros,
}

/// What came of an attempt to spend a refresh token.
#[derive(Clone, Debug, PartialEq)]
pub enum Spent {
    /// It was good, and is spent now.
    Ok(RefreshToken),
    /// It had been spent before: somebody holds a copy, and the family is to be revoked.
    Reused {
        family: String,
        user: String,
    },
    Expired,
    /// Never issued, forgotten after its expiry, or of a revoked family.
    Unknown,
}

/// A family is forgotten this long after its last token expired; until then reuse of its tokens is still recognised.
const FORGET_AFTER: Span = Span::seconds(24 * 60 * 60);

impl FromRow for User {
    fn from_row(row: &Row) -> Result<User, sqlx::Error> {
        Ok(User {
            id: row.try_get("id")?,
            email: row.try_get("email")?,
            password_hash: row.try_get("password_hash")?,
            admin: row.try_get("admin")?,
            created_at: row.time("created_at")?,
        })
    }
}

impl FromRow for RefreshToken {
    fn from_row(row: &Row) -> Result<RefreshToken, sqlx::Error> {
        Ok(RefreshToken {
            token_hash: row.try_get("token_hash")?,
            family: row.try_get("family")?,
            user: row.try_get("user_id")?,
            issued_at: row.time("issued_at")?,
            expires_at: row.time("expires_at")?,
        })
    }
}

/// Keeps a token of its family.
async fn insert_token(tx: &mut Tx, token: &RefreshToken) -> Result<(), sqlx::Error> {
    query("DELETE FROM refresh_families WHERE expires_at < $1")
        .bind(token.issued_at.minus(FORGET_AFTER))
        .execute(&mut *tx)
        .await?;
    query(
        "INSERT INTO refresh_families (family, revoked, expires_at) VALUES ($1, $2, $3) \
         ON CONFLICT (family) DO UPDATE SET expires_at = excluded.expires_at \
         WHERE excluded.expires_at > refresh_families.expires_at",
    )
    .bind(&token.family)
    .bind(false)
    .bind(token.expires_at)
    .execute(&mut *tx)
    .await?;
    query(
        "INSERT INTO refresh_tokens (token_hash, family, user_id, issued_at, expires_at) \
         VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(&token.token_hash)
    .bind(&token.family)
    .bind(&token.user)
    .bind(token.issued_at)
    .bind(token.expires_at)
    .execute(&mut *tx)
    .await?;
    Ok(())
}

/// Makes the tokens of every sign-in of a user useless: how many sign-ins there were.
pub(super) async fn revoke_families<'t>(on: impl Into<On<'t>>, user: &str) -> Result<u64, sqlx::Error> {
    query(
        "UPDATE refresh_families SET revoked = $2 WHERE NOT revoked \
         AND family IN (SELECT family FROM refresh_tokens WHERE user_id = $1)",
    )
    .bind(user)
    .bind(true)
    .execute(on)
    .await
}

impl Store {
    /// Adds a user. [`StoreError::Exists`] when the id or the e-mail address, in whatever case, is taken.
    pub async fn create_user(&self, user: &User) -> Result<(), StoreError> {
        query("INSERT INTO users (id, email, password_hash, admin, created_at) VALUES ($1, $2, $3, $4, $5)")
            .bind(&user.id)
            .bind(user.email.to_lowercase())
            .bind(&user.password_hash)
            .bind(user.admin)
            .bind(user.created_at)
            .execute(self.write(Scope::Installation))
            .await
            .map_err(failed("create user"))?;
        Ok(())
    }

    /// The user with this e-mail address, in whatever case.
    pub async fn user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        query_as("SELECT * FROM users WHERE email = $1")
            .bind(email.to_lowercase())
            .fetch_optional(self.read(Scope::Installation))
            .await
            .map_err(failed("read user"))
    }

    pub async fn user_by_id(&self, id: &str) -> Result<Option<User>, StoreError> {
        query_as("SELECT * FROM users WHERE id = $1")
            .bind(id)
            .fetch_optional(self.read(Scope::Installation))
            .await
            .map_err(failed("read user"))
    }

    /// How many users there are: none in a new data directory.
    pub async fn user_count(&self) -> Result<u64, StoreError> {
        let n: i64 = query_scalar("SELECT COUNT(*) FROM users")
            .fetch_one(self.read(Scope::Installation))
            .await
            .map_err(failed("count users"))?;
        Ok(n.unsigned_abs())
    }

    /// All users by e-mail address.
    pub async fn list_users(&self) -> Result<Vec<User>, StoreError> {
        query_as("SELECT * FROM users ORDER BY email")
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list users"))
    }

    /// Keeps a new token of its family; also forgets families that expired more than a day ago. In a revoked family it
    /// is kept and useless. [`StoreError::Missing`] when there is no such user.
    pub async fn insert_refresh(&self, token: &RefreshToken) -> Result<(), StoreError> {
        async {
            let mut tx = self.db.begin(Scope::Installation).await?;
            insert_token(&mut tx, token).await?;
            tx.commit().await
        }
        .await
        .map_err(failed("insert refresh token"))
    }

    /// As [`Store::insert_refresh`] for who came with the password of this hash: false, and nothing is kept, when the user
    /// has another one by now.
    pub async fn begin_sign_in(&self, token: &RefreshToken, password_hash: &str) -> Result<bool, StoreError> {
        async {
            let mut tx = self.db.begin(Scope::Installation).await?;
            // a lock that both databases know: a change of the password comes before, or ends this sign-in too
            let is_known = query("UPDATE users SET password_hash = password_hash WHERE id = $1 AND password_hash = $2")
                .bind(&token.user)
                .bind(password_hash)
                .execute(&mut tx)
                .await?;
            if is_known == 0 {
                return Ok(false);
            }
            insert_token(&mut tx, token).await?;
            tx.commit().await?;
            Ok(true)
        }
        .await
        .map_err(failed("begin sign-in"))
    }

    /// Spends a token, once: of any number of attempts at the same time one gets [`Spent::Ok`].
    pub async fn spend_refresh(&self, token_hash: &str, now: Micros) -> Result<Spent, StoreError> {
        async {
            let spend = query_as(
                "UPDATE refresh_tokens SET spent_at = $2 WHERE token_hash = $1 AND spent_at IS NULL \
                 AND expires_at > $2 AND family IN (SELECT family FROM refresh_families WHERE NOT revoked) \
                 RETURNING *",
            );
            if let Some(token) =
                spend.bind(token_hash).bind(now).fetch_optional(self.write(Scope::Installation)).await?
            {
                return Ok(Spent::Ok(token));
            }
            // Why not? No token goes back from spent to unspent, so this may be asked after the fact; the writer
            // knows the newest state.
            let refused = query(
                "SELECT t.family, t.user_id, t.spent_at IS NOT NULL AS spent, f.revoked \
                 FROM refresh_tokens t JOIN refresh_families f ON f.family = t.family WHERE t.token_hash = $1",
            );
            let Some(row) = refused.bind(token_hash).fetch_optional(self.write(Scope::Installation)).await? else {
                return Ok(Spent::Unknown);
            };
            Ok(match (row.try_get("spent")?, row.try_get("revoked")?) {
                (true, _) => Spent::Reused { family: row.try_get("family")?, user: row.try_get("user_id")? },
                (false, true) => Spent::Unknown,
                (false, false) => Spent::Expired,
            })
        }
        .await
        .map_err(failed("spend refresh token"))
    }

    /// Makes all tokens of a family useless, also those still to come. Does nothing for an unknown family.
    pub async fn revoke_family(&self, family: &str) -> Result<(), StoreError> {
        query("UPDATE refresh_families SET revoked = $2 WHERE family = $1")
            .bind(family)
            .bind(true)
            .execute(self.write(Scope::Installation))
            .await
            .map_err(failed("revoke token family"))?;
        Ok(())
    }

    /// Makes the tokens of every sign-in of a user useless: how many sign-ins there were.
    pub async fn revoke_families_of(&self, user: &str) -> Result<u64, StoreError> {
        revoke_families(self.write(Scope::Installation), user).await.map_err(failed("revoke sign-ins"))
    }

    /// Gives a user another password and ends every sign-in: whether there is such a user, whose password has the hash
    /// `known` where one is given.
    pub async fn set_password(&self, user: &str, known: Option<&str>, password_hash: &str) -> Result<bool, StoreError> {
        async {
            let mut tx = self.db.begin(Scope::Installation).await?;
            let changed =
                query("UPDATE users SET password_hash = $2 WHERE id = $1 AND ($3 IS NULL OR password_hash = $3)")
                    .bind(user)
                    .bind(password_hash)
                    .bind(known)
                    .execute(&mut tx)
                    .await?;
            if changed > 0 {
                revoke_families(&mut tx, user).await?;
            }
            tx.commit().await?;
            Ok(changed > 0)
        }
        .await
        .map_err(failed("set password"))
    }

    /// Whether the family was revoked; `false` for one the store does not know.
    pub async fn family_revoked(&self, family: &str) -> Result<bool, StoreError> {
        let revoked: Option<bool> = query_scalar("SELECT revoked FROM refresh_families WHERE family = $1")
            .bind(family)
            .fetch_optional(self.read(Scope::Installation))
            .await
            .map_err(failed("read token family"))?;
        Ok(revoked.unwrap_or(false))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn token(hash: &str, issued_at: Micros) -> RefreshToken {
        RefreshToken {
            token_hash: hash.into(),
            family: "family".into(),
            user: "ann".into(),
            issued_at,
            expires_at: issued_at.plus(Span::seconds(60)),
        }
    }

    #[tokio::test]
    async fn an_email_address_is_one_address_in_whatever_case() {
        let (store, _dir) = store().await;
        let ann = User {
            id: "ann".into(),
            email: "Ann@Example.com".into(),
            password_hash: "hash".into(),
            admin: true,
            created_at: Micros(7),
        };
        store.create_user(&ann).await.unwrap();
        let again = User { id: "other".into(), email: "ANN@example.com".into(), ..ann.clone() };
        assert!(matches!(store.create_user(&again).await, Err(StoreError::Exists { operation: "create user" })));

        let expected = User { email: "ann@example.com".into(), ..ann };
        assert_eq!(store.user_by_email("aNN@example.COM").await.unwrap(), Some(expected.clone()));
        assert_eq!(store.user_by_id("ann").await.unwrap(), Some(expected.clone()));
        assert_eq!(store.user_by_id("other").await.unwrap(), None);
        assert_eq!((store.user_count().await.unwrap(), store.list_users().await.unwrap()), (1, vec![expected]));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_eight_parallel_attempts_one_spends_the_token() {
        let (store, _dir) = store().await;
        add_user(&store, "ann").await;
        store.insert_refresh(&token("t", Micros(0))).await.unwrap();
        let attempts = (0..8).map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.spend_refresh("t", Micros(1)).await.unwrap() })
        });
        let outcomes = futures::future::join_all(attempts).await;
        let ok = outcomes.iter().filter(|o| matches!(o.as_ref().unwrap(), Spent::Ok(_))).count();
        let reused = outcomes.iter().filter(|o| matches!(o.as_ref().unwrap(), Spent::Reused { .. })).count();
        assert_eq!((ok, reused), (1, 7));
    }

    #[tokio::test]
    async fn a_token_is_good_until_it_expires() {
        let (store, _dir) = store().await;
        add_user(&store, "ann").await;
        let token = token("t", Micros(0));
        store.insert_refresh(&token).await.unwrap();
        assert_eq!(store.spend_refresh("t", token.expires_at).await.unwrap(), Spent::Expired);
        assert_eq!(store.spend_refresh("t", Micros(1)).await.unwrap(), Spent::Ok(token));
        assert_eq!(store.spend_refresh("none", Micros(1)).await.unwrap(), Spent::Unknown);
    }

    #[tokio::test]
    async fn a_successor_written_after_its_family_was_revoked_is_useless() {
        let (store, _dir) = store().await;
        add_user(&store, "ann").await;
        store.insert_refresh(&token("first", Micros(0))).await.unwrap();
        store.spend_refresh("first", Micros(1)).await.unwrap();
        let theft = Spent::Reused { family: "family".into(), user: "ann".into() };
        assert_eq!(store.spend_refresh("first", Micros(2)).await.unwrap(), theft);
        assert!(!store.family_revoked("family").await.unwrap());
        store.revoke_family("family").await.unwrap();
        assert!(store.family_revoked("family").await.unwrap());

        store.insert_refresh(&token("second", Micros(3))).await.unwrap();
        assert_eq!(store.spend_refresh("second", Micros(4)).await.unwrap(), Spent::Unknown);
        assert!(store.family_revoked("family").await.unwrap());
    }

    #[tokio::test]
    async fn all_sign_ins_of_a_user_end_together_and_those_of_others_go_on() {
        let (store, _dir) = store().await;
        for user in ["ann", "bob"] {
            add_user(&store, user).await;
            for n in 0..2 {
                let (hash, user) = (format!("{user}{n}"), user.to_owned());
                let token = RefreshToken { family: hash.clone(), user, ..token(&hash, Micros(0)) };
                store.insert_refresh(&token).await.unwrap();
            }
        }
        assert_eq!(store.revoke_families_of("ann").await.unwrap(), 2);
        assert_eq!(store.revoke_families_of("ann").await.unwrap(), 0);
        assert_eq!(store.spend_refresh("ann0", Micros(1)).await.unwrap(), Spent::Unknown);
        assert!(store.family_revoked("ann1").await.unwrap() && !store.family_revoked("bob1").await.unwrap());
        assert!(matches!(store.spend_refresh("bob0", Micros(1)).await.unwrap(), Spent::Ok(_)));
    }

    #[tokio::test]
    async fn a_sign_in_with_a_password_that_was_changed_meanwhile_is_none() {
        let (store, _dir) = store().await;
        add_user(&store, "ann").await;
        let (now, hash) = (Micros(1_000_000), "hash");
        assert!(store.begin_sign_in(&token("a", now), hash).await.unwrap());
        assert!(!store.set_password("ann", Some("another"), "new").await.unwrap(), "somebody was faster");
        assert!(!store.family_revoked("family").await.unwrap());
        assert!(store.set_password("ann", Some(hash), "new").await.unwrap());
        assert!(store.family_revoked("family").await.unwrap());
        assert!(!store.begin_sign_in(&token("b", now), hash).await.unwrap());
        assert!(store.set_password("ann", None, "newest").await.unwrap());
        assert!(store.begin_sign_in(&token("b", now), "newest").await.unwrap());
    }

    #[tokio::test]
    async fn families_are_forgotten_a_day_after_they_expired() {
        let (store, _dir) = store().await;
        add_user(&store, "ann").await;
        let old = token("old", Micros(0));
        store.insert_refresh(&old).await.unwrap();
        let after = old.expires_at.plus(FORGET_AFTER);
        let other = |hash: &str, at| RefreshToken { family: hash.into(), ..token(hash, at) };
        store.insert_refresh(&other("new", after)).await.unwrap();
        assert_eq!(store.spend_refresh("old", after).await.unwrap(), Spent::Expired);
        store.insert_refresh(&other("newer", after.plus(Span(1)))).await.unwrap();
        assert_eq!(store.spend_refresh("old", after).await.unwrap(), Spent::Unknown);
    }

    #[tokio::test]
    async fn a_token_for_nobody_is_refused() {
        let (store, _dir) = store().await;
        assert!(matches!(store.insert_refresh(&token("t", Micros(0))).await, Err(StoreError::Missing { .. })));
        assert!(!store.family_revoked("family").await.unwrap());
    }
}
