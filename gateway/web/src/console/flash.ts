/** A short tint of a value that changed: green up, red down. Still for readers who asked for less motion. */
const calm = matchMedia('(prefers-reduced-motion: reduce)');

export function flash(node: HTMLElement, value: number | null) {
  let last = value;
  return {
    update(next: number | null) {
      const before = last;
      last = next;
      if (before === null || next === null || before === next || calm.matches) return;
      const colour = getComputedStyle(node).getPropertyValue(next > before ? '--up' : '--down');
      const tint = { color: colour, backgroundColor: `color-mix(in srgb, ${colour} 9%, transparent)` };
      node.animate([tint, { ...tint, offset: 0.3 }, {}], { duration: 900, easing: 'ease-out' });
    },
  };
}
