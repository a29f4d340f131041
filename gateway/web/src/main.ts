import './app.css';
import { mount } from 'svelte';
import App from './console/App.svelte';

mount(App, { target: document.getElementById('app')! });
