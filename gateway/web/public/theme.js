// Runs before the first paint, so that a chosen theme does not flash. A file of its own, since the page allows no inline script.
{
  const chosen = localStorage.getItem('tidewatch.theme');
  if (chosen) document.documentElement.dataset.theme = chosen;
}
