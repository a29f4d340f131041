// The console in a real browser against a running server. Asks for TIDEWATCH_URL, TIDEWATCH_EMAIL, TIDEWATCH_PASSWORD,
// TIDEWATCH_WORKSPACE and TIDEWATCH_METRIC (a metric over market.trades, keyed by symbol); SCREENSHOT_DIR is optional.
// The user must be an admin, since another user is made who may do less.
// Prints `ok` or `not ok` for each test; the exit status is 1 when one failed, 2 when it was called badly.
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { chromium } from 'playwright-core';

const NAMES = ['TIDEWATCH_URL', 'TIDEWATCH_EMAIL', 'TIDEWATCH_PASSWORD', 'TIDEWATCH_WORKSPACE', 'TIDEWATCH_METRIC'];
const missing = NAMES.filter((name) => !process.env[name]);
if (missing.length > 0) {
  console.error(`set ${missing.join(', ')}; the server must be running`);
  process.exit(2);
}
const [url, email, password, workspace, metric] = NAMES.map((name) => process.env[name]);
const base = url.replace(/\/$/, '');
const shots = process.env.SCREENSHOT_DIR ?? 'test-results';
mkdirSync(shots, { recursive: true });

const SYMBOL = 'ZZTEST';
const WAIT = 10_000;
const BROWSER = {
  executablePath: '/usr/bin/chromium',
  args: [
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
  ],
};

let passed = 0;
let failed = 0;

async function check(name, body) {
  try {
    await body();
    passed += 1;
    console.log(`ok - ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`not ok - ${name}\n  ${String(error?.message ?? error).replaceAll('\n', '\n  ')}`);
  }
}

function expect(truth, otherwise) {
  if (!truth) throw new Error(otherwise);
}

async function until(what, condition) {
  const end = Date.now() + WAIT;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > end) throw new Error(`waited ${WAIT} ms for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

async function api(path, body, token, method = 'POST') {
  const headers = { 'content-type': 'application/json', ...(token ? { authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(`${base}/api/v1${path}`, { method, headers, body: body && JSON.stringify(body) });
  const text = await response.text();
  expect(response.ok, `${method} ${path} answered ${response.status}: ${text}`);
  return text && JSON.parse(text);
}

const token = async () => (await api('/auth/login', { email, password })).access_token;

const trade = (price) => ({ symbol: SYMBOL, price, qty: 10, side: 'buy', id: `zz-${Date.now()}-${price}` });

/** Posts a trade of the test symbol as any other client would. */
async function send(price) {
  return api(`/workspaces/${workspace}/streams/market.trades/events`, [trade(price)], await token());
}

const cellsOf = (page) => page.locator(`[data-testid^="cell-${SYMBOL}-"]`);
const read = async (page) => (await cellsOf(page).allTextContents()).map((text) => text.trim()).join(' | ');

/** A page that remembers everything the browser complained of. */
async function open(browser, options) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.setDefaultTimeout(WAIT);
  const complaints = [];
  page.on('pageerror', (error) => complaints.push(error.message));
  page.on('console', (message) => {
    if (message.type() === 'error') complaints.push(`${message.text()} (${message.location().url})`);
  });
  return { page, complaints };
}

async function signIn(page, secret = password, name = email) {
  await page.getByTestId('sign-in-email').fill(name);
  await page.getByTestId('sign-in-password').fill(secret);
  await page.getByTestId('sign-in-submit').click();
}

/** Says what reached the reader, so that a test can see that the page was never loaded again. */
const mark = (page) => page.evaluate(() => (window.sameDocument = true));
const unchanged = (page) => page.evaluate(() => window.sameDocument === true);

const live = (page) => page.locator('[data-testid="connection-state"][data-state="live"]').waitFor();
const tone = (page) => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
const brightness = (rgb) =>
  rgb
    .match(/\d+/g)
    .slice(0, 3)
    .map(Number)
    .reduce((a, b) => a + b) / 3;
const fits = (page) => page.evaluate(() => document.documentElement.scrollWidth <= window.innerWidth);

async function desktop(browser) {
  const { page, complaints } = await open(browser, { viewport: { width: 1440, height: 900 }, colorScheme: 'light' });
  await page.goto(`${base}/`);

  await check('a wrong password is refused with the reason', async () => {
    await signIn(page, `${password}-wrong`);
    const reason = await page.getByTestId('sign-in-problem').textContent();
    expect(reason.trim().length > 0, 'the refusal says nothing');
    // The browser itself reports the refused request; that is the only complaint that belongs here.
    complaints.splice(0, complaints.length, ...complaints.filter((text) => !text.includes('/auth/login')));
  });

  await check('signing in opens the console', async () => {
    await signIn(page);
    await page.getByTestId('workspace-select').waitFor();
    await mark(page);
  });

  await check('the workspace and the metric open by their selects', async () => {
    await page.getByTestId('workspace-select').selectOption(workspace);
    await page.getByTestId('metric-select').selectOption(metric);
    await page.getByTestId('rows-table').waitFor();
    const address = decodeURIComponent(new URL(page.url()).hash);
    expect(address === `#/${workspace}/${metric}`, `the address is ${address}`);
  });

  await check('the connection badge says live', () => live(page));

  const cells = cellsOf(page);

  await check('a new trade appears in the table', async () => {
    const answer = await send(100);
    expect(answer.accepted === 1, `the ingest answered ${JSON.stringify(answer)}`);
    await page.getByTestId('rows-filter').fill(SYMBOL);
    await until(`a row of ${SYMBOL}`, () => cells.count());
  });

  await check('another trade changes the value on the page without a reload', async () => {
    const before = await read(page);
    await send(200);
    const after = await until(`a change of "${before}"`, async () => {
      const now = await read(page);
      return now !== before && now;
    });
    expect(/\d/.test(after), `the row reads "${after}"`);
    expect(await unchanged(page), 'the page was loaded again');
    await page.getByTestId('rows-filter').fill('');
  });

  await check('a column sorts both ways by its header', async () => {
    const head = page.getByTestId('rows-table').locator('th[aria-sort]').first();
    await head.getByRole('button').click();
    expect((await head.getAttribute('aria-sort')) === 'ascending', 'the first press does not sort upwards');
    await head.getByRole('button').click();
    expect((await head.getAttribute('aria-sort')) === 'descending', 'the second press does not sort downwards');
    await head.getByRole('button').click();
  });

  await check('the chart draws, and is described in words', async () => {
    const chart = page.getByRole('img', { name: /^Line chart of/ });
    await chart.locator('canvas').waitFor();
    const words = await until('a described chart', async () => {
      const label = await chart.getAttribute('aria-label');
      return /\d/.test(label.split(':').slice(1).join(':')) && label;
    });
    expect(words.length > 0, 'the chart has no description');
  });

  await check('alerts, portfolio and chat are there', async () => {
    await page.getByTestId('alert-list').waitFor();
    await page.getByTestId('chat-input').waitFor();
    await until('a portfolio card or the word that there is none', async () => {
      return (await page.getByTestId('portfolio-card').count()) || (await page.getByText('No portfolio yet').count());
    });
  });

  await check('the analyst answers', async () => {
    const log = page.getByTestId('chat-log');
    await page.getByTestId('chat-input').fill('Which symbols have a metric now?');
    await page.getByTestId('chat-send').click();
    await until('the end of the answer', async () => (await log.getAttribute('aria-busy')) === 'false');
    expect((await log.getByRole('alert').count()) === 0, `the run failed: ${await log.textContent()}`);
    expect((await log.locator('.assistant').count()) > 0, 'there is no answer');
  });

  await check('the drawer sends an event and shows the answer', async () => {
    await page.getByTestId('send-event').click();
    await page.getByTestId('event-body').fill(JSON.stringify(trade(150)));
    await page.getByTestId('event-submit').click();
    await page.getByTestId('event-answer').getByText('1 accepted').waitFor();
    await page.keyboard.press('Escape');
    await page.getByRole('dialog').waitFor({ state: 'detached' });
  });

  await check('the theme toggle makes it dark, and a reload keeps theme, session and place', async () => {
    expect(brightness(await tone(page)) > 200, `the light page is ${await tone(page)}`);
    await page.getByTestId('theme-toggle').click();
    expect(brightness(await tone(page)) < 60, `the dark page is ${await tone(page)}`);
    await page.reload();
    await live(page);
    expect(brightness(await tone(page)) < 60, `the page is ${await tone(page)} after a reload`);
    expect((await page.getByTestId('metric-select').inputValue()) === metric, 'another metric is open after a reload');
  });

  await check('the page fits a desktop', async () => {
    await page.locator(`[data-testid="rows-table"] tbody tr`).first().waitFor();
    await new Promise((resolve) => setTimeout(resolve, 1500)); // let the chart's history arrive before the picture
    await page.screenshot({ path: join(shots, 'desktop-dark.png') });
    expect(await fits(page), 'the page is wider than the window');
  });

  await check('the browser had nothing to complain of on the desktop', () => {
    expect(complaints.length === 0, complaints.join('\n'));
  });
}

async function phone(browser) {
  const { page, complaints } = await open(browser, {
    viewport: { width: 390, height: 844 },
    deviceScaleFactor: 2,
    isMobile: true,
    hasTouch: true,
    colorScheme: 'dark',
    reducedMotion: 'reduce',
  });
  // The page's socket goes through our hands, to be cut as a restarting server cuts it, and held off for a while.
  let held = false;
  let cut = async () => {};
  await page.routeWebSocket(/\/api\/v1\/ws$/, (socket) => {
    if (held) return void socket.close({ code: 1012 });
    const server = socket.connectToServer();
    cut = async () => {
      await socket.close({ code: 1012, reason: 'restart' });
      await server.close();
    };
  });

  await check('a shared address opens on a phone, dark where the system is', async () => {
    await page.goto(`${base}/#/${workspace}/${metric}`);
    await signIn(page);
    await live(page);
    expect((await page.getByTestId('metric-select').inputValue()) === metric, 'another metric is open');
    expect(brightness(await tone(page)) < 60, `the page is ${await tone(page)}`);
    await page.locator(`[data-testid="rows-table"] tbody tr`).first().waitFor();
    await new Promise((resolve) => setTimeout(resolve, 1500)); // as above
    await page.screenshot({ path: join(shots, 'phone-dark.png') });
    expect(await fits(page), 'the page is wider than the phone');
  });

  await check('a cut connection shows, and the page catches up by itself with what it missed', async () => {
    await page.getByTestId('rows-filter').fill(SYMBOL);
    await cellsOf(page).first().waitFor();
    await mark(page);
    const before = await read(page);
    held = true;
    await cut();
    await page.locator('[data-testid="connection-state"][data-state="reconnecting"]').waitFor();
    await send(300);
    const added = `/workspaces/${workspace}/metrics/added_meanwhile`;
    const sql = `SELECT symbol, max(price) AS high FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol`;
    await api(added, { sql }, await token(), 'PUT');
    held = false;
    await live(page);
    await until(`a change of "${before}"`, async () => (await read(page)) !== before);
    await page.getByTestId('metric-select').locator('option[value="added_meanwhile"]').waitFor({ state: 'attached' });
    await api(added, undefined, await token(), 'DELETE');
    expect(await unchanged(page), 'the page was loaded again');
  });

  await check('a workspace is made from a pack, and opens with its metrics', async () => {
    await page.getByTestId('workspace-select').selectOption({ label: 'New workspace…' });
    const id = `made-${Date.now()}`;
    await page.getByTestId('workspace-name').fill(`Made: ${Date.now()}`);
    await page.getByTestId('workspace-id').fill(id);
    await page.getByTestId('pack-venture').check();
    await page.screenshot({ path: join(shots, 'phone-new-workspace.png') });
    expect(await fits(page), 'the form is wider than the phone');
    await page.getByTestId('create-workspace').click();
    await page.getByTestId('metric-select').waitFor();
    const first = await page.getByTestId('metric-select').inputValue();
    expect(first === 'price_1m', `the first metric is ${first}`);
    expect(new URL(page.url()).hash.startsWith(`#/${id}`), `the address is ${page.url()}`);
  });

  await check('signing out goes back to the door', async () => {
    await page.getByRole('button', { name: 'Sign out' }).click();
    await page.getByTestId('sign-in-email').waitFor();
    await page.reload();
    await page.getByTestId('sign-in-email').waitFor();
  });

  await check('the browser had nothing to complain of on the phone', () => {
    expect(complaints.length === 0, complaints.join('\n'));
  });
}

/** A workspace of its own with the price of one symbol over the last minutes: 100, 101 and so on up to `LAST`. */
const MINUTES = 20;
const LAST = 100 + MINUTES - 1;
async function climbing() {
  const owner = await token();
  const id = `lists-${Date.now()}`;
  const change = (path, body, method = 'PUT') => api(`/workspaces/${id}${path}`, body, owner, method);
  await api('/workspaces', { id, name: 'Lists' }, owner);
  const high = (window) => `SELECT symbol, max(price) AS high FROM market.trades GROUP BY ${window}, symbol`;
  const windows = {
    cumulated: `cumulate(ts, INTERVAL '1 minute', INTERVAL '1 day')`,
    hopping: `hop(ts, INTERVAL '1 minute', INTERVAL '1 day')`,
    tumbling: `tumble(ts, INTERVAL '1 minute')`,
  };
  for (const [name, window] of Object.entries(windows)) await change(`/metrics/${name}`, { sql: high(window) });
  const minutesAgo = (n) => new Date(Date.now() - n * 60_000).toISOString();
  const trades = Array.from({ length: MINUTES }, (_, i) => ({
    symbol: SYMBOL,
    price: 100 + i,
    qty: 1,
    ts: minutesAgo(MINUTES - 1 - i),
  }));
  await change('/streams/market.trades/events', trades, 'POST');
  return { id, change, high, windows: Object.keys(windows) };
}

async function lists(browser) {
  const { id, change, high, windows } = await climbing();
  const { page, complaints } = await open(browser, { viewport: { width: 1280, height: 800 } });
  await page.goto(`${base}/#/${id}`);
  await signIn(page);
  await live(page);
  const option = (name) => page.getByTestId('metric-select').locator(`option[value="${name}"]`);
  /** What a browser tells a page that its reader comes back to. */
  const comeBack = () => page.evaluate(() => dispatchEvent(new Event('focus')));
  const address = () => decodeURIComponent(new URL(page.url()).hash);

  await check('an address without a metric opens the first, and says which', async () => {
    await until('the address of a metric', () => address() === `#/${id}/cumulated`);
  });

  for (const name of windows) {
    await check(`a chart of ${name} windows opens with its past`, async () => {
      await page.getByTestId('metric-select').selectOption(name);
      const legend = page.getByTitle(`Take ${SYMBOL} off the chart`).locator('b');
      const plot = page.locator('.u-over');
      await until('the newest value', async () => (await legend.textContent()) === String(LAST));
      await until('the oldest value at the left of the chart', async () => {
        const { x, y } = await plot.boundingBox();
        await page.mouse.move(x + 1, y + 40);
        return (await legend.textContent()) === '100';
      });
      await page.mouse.move(0, 0);
    });
  }

  await check('what others add is in the lists when the reader comes back, and nothing else moves', async () => {
    await mark(page);
    await page.getByTestId('rows-filter').fill(SYMBOL);
    await page.getByTestId('chat-input').fill('half a question');
    await change('/metrics/added', { sql: high(`tumble(ts, INTERVAL '5 minutes')`) });
    await change('/portfolios', { id: 'added', name: 'Added' }, 'POST');
    const rule = { name: 'added', metric: 'added', condition: 'high > 1000', for: '0s', severity: 'warning' };
    await change('/alert-rules', rule, 'POST');
    expect((await option('added').count()) === 0, 'it is there already: this test tells nothing');
    await comeBack();
    await option('added').waitFor({ state: 'attached' });
    await page.locator('[data-testid="portfolio-card"][data-portfolio="added"]').waitFor();
    await page.getByTestId('alert-list').getByText('One rule watches').waitFor();
    expect((await page.getByTestId('metric-select').inputValue()) === windows.at(-1), 'another metric is open');
    expect((await page.getByTestId('rows-filter').inputValue()) === SYMBOL, 'the filter is gone');
    expect((await page.getByTestId('chat-input').inputValue()) === 'half a question', 'the question is gone');
    expect(await unchanged(page), 'the page was loaded again');
  });

  await check('a metric that others delete is shown as gone, with a way back', async () => {
    await change(`/metrics/${windows.at(-1)}`, undefined, 'DELETE');
    await page
      .getByTestId('not-found')
      .getByText(`There is no metric “${windows.at(-1)}”`)
      .waitFor();
    await page.getByTestId('not-found').getByRole('link', { name: 'hopping' }).click();
    await page.getByTestId('rows-table').waitFor();
    expect(address() === `#/${id}/hopping`, `the address is ${address()}`);
    expect(await unchanged(page), 'the page was loaded again');
  });

  await check('a metric that others define anew opens as it is now', async () => {
    await change('/metrics/hopping', { sql: high(`tumble(ts, INTERVAL '1 hour')`) });
    await page.getByText('1h windows over market.trades').waitFor();
  });

  await check('an address of nothing says so, and leads back', async () => {
    for (const nowhere of ['#/nonsense', '#/%E0%A4%A', `#/${id}/nonsense`, `#/${id}/hopping/more`]) {
      await page.goto(`${base}/${nowhere}`);
      await page.getByTestId('not-found').waitFor();
      await page.getByTestId('not-found').locator(`a[href^="#/${id}"]`).first().click();
      await page.getByTestId('rows-table').waitFor();
      expect(address().startsWith(`#/${id}/`), `the address is ${address()}`);
    }
  });

  await check('what lies over the page goes away by Escape and by a press elsewhere', async () => {
    await page.goto(`${base}/#/${id}/cumulated`);
    const sql = page.getByText('up to 1d in steps of 1m over market.trades');
    const opens = [sql, page.getByTestId('usage').locator('summary')];
    for (const leave of [() => page.keyboard.press('Escape'), () => page.getByText('Current rows').click()]) {
      for (const summary of opens) {
        await summary.click();
        const details = page.locator('details[open]');
        await details.waitFor();
        await leave();
        await details.waitFor({ state: 'detached' });
      }
    }
  });

  await check('an event is sent to the stream that the open metric waits for', async () => {
    const sql = `SELECT thread, count(*) AS n FROM chat.messages GROUP BY tumble(ts, INTERVAL '1 minute'), thread`;
    await change('/metrics/quiet', { sql });
    await comeBack();
    await page.getByTestId('metric-select').selectOption('quiet');
    await page.getByText('No rows yet').waitFor();
    await page.getByRole('region', { name: 'Current rows' }).getByRole('button', { name: 'Send an event' }).click();
    const stream = await page.getByTestId('event-stream').inputValue();
    expect(stream === 'chat.messages', `the form opens for ${stream}`);
    await page.keyboard.press('Escape');
  });

  await check('the browser had nothing to complain of with the lists', () => {
    expect(complaints.length === 0, complaints.join('\n'));
  });
  await page.context().close();
  await change('', undefined, 'DELETE');
}

async function viewer(browser) {
  const { id, change } = await climbing();
  const rule = { name: 'high', metric: 'tumbling', condition: `high >= ${LAST}`, for: '0s', severity: 'warning' };
  await change('/alert-rules', rule, 'POST');
  await change('/streams/market.trades/events', [{ symbol: SYMBOL, price: LAST, qty: 1 }], 'POST');
  const name = `${id}@tidewatch.local`;
  await api('/users', { email: name, password }, await token());
  await change('/members', { email: name, role: 'viewer' });
  const { page, complaints } = await open(browser, { viewport: { width: 1280, height: 800 } });
  await page.goto(`${base}/#/${id}`);
  await signIn(page, password, name);
  await until('the invitation, or the workspace', async () => {
    if (await page.getByTestId(`invitation-${id}`).count()) await page.getByRole('button', { name: 'Join' }).click();
    return page.getByTestId('workspace-select').count();
  });

  await check('a viewer sees what there is, and which permission each closed door takes', async () => {
    await live(page);
    await page.getByTestId('rows-table').locator('tbody tr').first().waitFor();
    const closed = async (button, permission) => {
      await button.waitFor();
      expect(await button.isDisabled(), `the button that takes ${permission} can be pressed`);
      expect((await button.getAttribute('title')).includes(permission), `its title does not name ${permission}`);
    };
    await closed(page.getByTestId('send-event'), 'stream:ingest');
    await closed(page.getByRole('button', { name: 'Acknowledge high' }), 'alert:respond');
    await page.getByTestId('withheld-ai:use').waitFor();
    await page.screenshot({ path: join(shots, 'viewer.png') });
  });

  await check('a role that changes opens its doors', async () => {
    await change('/members', { email: name, role: 'member' });
    await page.evaluate(() => dispatchEvent(new Event('focus')));
    await page.getByTestId('chat-input').waitFor();
    expect(await page.getByTestId('send-event').isEnabled(), 'no event can be sent');
    await page.getByRole('button', { name: 'Acknowledge high' }).click();
    await page.getByTestId('alert-list').getByText('seen').waitFor();
  });

  await check('an alert that others silence says so', async () => {
    await change('/silences', { matchers: { symbol: SYMBOL }, duration: '1h' }, 'POST');
    await page.evaluate(() => dispatchEvent(new Event('focus')));
    await page.getByTestId('alert-list').getByText('silenced').waitFor();
  });

  await check('a workspace that others take away is shown as not there', async () => {
    await change('', undefined, 'DELETE');
    await page.evaluate(() => dispatchEvent(new Event('focus')));
    await page.getByTestId('not-found').getByText('There is no workspace').waitFor();
    await page.getByRole('link', { name: 'Make a workspace' }).click();
    await page.getByTestId('workspace-name').waitFor();
  });

  await check('the browser had nothing to complain of before the viewer', () => {
    const own = complaints.filter((text) => !text.includes(id)); // requests that met the end of the workspace
    expect(own.length === 0, own.join('\n'));
  });
  await page.context().close();
}

const browser = await chromium.launch(BROWSER);
await desktop(browser);
await phone(browser);
await lists(browser);
await viewer(browser);
await browser.close();
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed === 0 ? 0 : 1);
