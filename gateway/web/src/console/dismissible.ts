/** Closes an open `<details>` that lies over the page: by Escape, or by a press elsewhere. */
export function dismissible(details: HTMLDetailsElement) {
  function onPress(event: Event) {
    if (!details.contains(event.target as Node)) details.open = false;
  }
  function onKey(event: KeyboardEvent) {
    if (event.key !== 'Escape' || !details.open) return;
    if (details.contains(document.activeElement)) details.querySelector('summary')?.focus();
    details.open = false;
  }
  document.addEventListener('pointerdown', onPress);
  document.addEventListener('keydown', onKey);
  return {
    destroy() {
      document.removeEventListener('pointerdown', onPress);
      document.removeEventListener('keydown', onKey);
    },
  };
}
