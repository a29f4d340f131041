import { svelte } from '@sveltejs/vite-plugin-svelte';
import { copyFileSync, mkdirSync } from 'node:fs';
import { defineConfig } from 'vitest/config';

/** Where `npm run dev` finds a running `tidewatch`. */
const SERVER = 'http://127.0.0.1:8080';

/** Puts Swagger UI where the server's page at `/docs` finds it: nothing is loaded from elsewhere. */
const swagger = {
  name: 'swagger-ui',
  closeBundle() {
    mkdirSync('dist/swagger', { recursive: true });
    for (const file of ['swagger-ui-bundle.js', 'swagger-ui.css']) {
      copyFileSync(`node_modules/swagger-ui-dist/${file}`, `dist/swagger/${file}`);
    }
  },
};

export default defineConfig({
  plugins: [svelte(), swagger],
  build: {
    target: 'es2022',
    // The console runs under `default-src 'self'`: nothing inline, no data: URLs.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  server: { proxy: { '/api': { target: SERVER, ws: true } } },
  test: { include: ['src/**/*.test.ts'] },
});
