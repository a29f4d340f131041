import { expect, test } from 'vitest';
import { Fetched } from './fetched.svelte';

/** Answers that come when the test says so. */
function answers() {
  const waiting: { resolve: (names: string[]) => void; reject: (error: unknown) => void }[] = [];
  const fetched = new Fetched(() => new Promise<string[]>((resolve, reject) => waiting.push({ resolve, reject })));
  return { fetched, waiting };
}

test('the same answer again keeps its identity', async () => {
  const fetched = new Fetched(async () => ['a']);
  await fetched.load();
  const first = fetched.value;
  await fetched.load();
  expect(fetched.value).toBe(first);
});

test('an answer that comes after a later one is dropped', async () => {
  const { fetched, waiting } = answers();
  const loads = [fetched.load(), fetched.load()];
  waiting[1]!.resolve(['new']);
  waiting[0]!.resolve(['old']);
  await Promise.all(loads);
  expect(fetched.value).toEqual(['new']);
});

test('what was asked before it was cleared does not come back', async () => {
  const { fetched, waiting } = answers();
  const load = fetched.load();
  fetched.clear();
  waiting[0]!.resolve(['old']);
  await load;
  expect(fetched.value).toBeNull();
});

test('a failure leaves what is shown, and the next answer clears it', async () => {
  let fails = false;
  const fetched = new Fetched(async () => (fails ? Promise.reject(new Error('away')) : ['a']));
  await fetched.load();
  fails = true;
  await fetched.load();
  expect(fetched.value).toEqual(['a']);
  expect(fetched.problem).toEqual(new Error('away'));
  fails = false;
  await fetched.load();
  expect(fetched.problem).toBeNull();
});
