// What the page shows is made from /page.json alone. Names come from other nodes: they are only ever set as text.
'use strict';

const COLOURS = {
  unknown: '#9aa0a6', fine: '#2a9d5c', no_daemon: '#6aa5d8', port_blocked: '#d6453d', mtu_black_hole: '#e0801f',
  checksum_offload: '#c2418f', stale_mac: '#8d55c7', stale_fdb: '#6b4fd0', own_filter: '#b5651d', peer_down: '#7d1a1a',
  asymmetric: '#d9b310',
};
const $ = (id) => document.getElementById(id);
let page = null;
let cells = null;

function table(id, header, rows) {
  const body = document.createElement('tbody');
  for (const [kind, row] of [['th', header], ...rows.map((row) => ['td', row])]) {
    const tr = body.insertRow();
    for (const value of row) {
      const cell = document.createElement(kind);
      const [text, name] = Array.isArray(value) ? value : [value, ''];
      cell.textContent = text;
      if (name) cell.className = name;
      tr.append(cell);
    }
  }
  $(id).replaceChildren(body);
}

function canvas(id) {
  const element = $(id);
  const scale = window.devicePixelRatio || 1;
  const { width, height } = element.getBoundingClientRect();
  element.width = width * scale;
  element.height = height * scale;
  const draw = element.getContext('2d');
  draw.scale(scale, scale);
  draw.font = '12px system-ui, sans-serif';
  return { draw, width, height, ink: getComputedStyle(document.body).color };
}

function topology() {
  const { draw, width, height, ink } = canvas('topology');
  const peers = page.mesh.peers;
  const [x, y] = [width / 2, height / 2];
  const named = peers.length <= 60;
  const radius = Math.min(width, height) / 2 - (named ? 34 : 12);
  const dot = Math.max(1.5, Math.min(7, (radius * 2) / Math.max(peers.length, 1)));
  peers.forEach((peer, place) => {
    const angle = (place / peers.length) * 2 * Math.PI - Math.PI / 2;
    const [px, py] = [x + radius * Math.cos(angle), y + radius * Math.sin(angle)];
    draw.strokeStyle = draw.fillStyle = COLOURS[peer.cause] || '#888';
    draw.globalAlpha = peer.cause === 'fine' ? Math.max(0.15, 1 - peers.length / 100) : 1;
    draw.lineWidth = peers.length > 100 ? 0.6 : 1.5;
    draw.beginPath();
    draw.moveTo(x, y);
    draw.lineTo(px, py);
    draw.stroke();
    draw.globalAlpha = 1;
    draw.beginPath();
    draw.arc(px, py, dot, 0, 2 * Math.PI);
    draw.fill();
    if (named) {
      draw.fillStyle = ink;
      draw.textAlign = Math.cos(angle) > 0.3 ? 'left' : Math.cos(angle) < -0.3 ? 'right' : 'center';
      const away = radius + dot + 6;
      draw.fillText(peer.node, x + away * Math.cos(angle), y + away * Math.sin(angle) + 4);
    }
  });
  draw.fillStyle = ink;
  draw.beginPath();
  draw.arc(x, y, 8, 0, 2 * Math.PI);
  draw.fill();
  draw.textAlign = 'center';
  draw.fillText(page.status.node, x, y - 12);
}

function heat() {
  const { draw, width, height, ink } = canvas('heat');
  const rows = page.matrix;
  const names = [...new Set(rows.flatMap((row) => [row.node, ...row.names]))]
    .sort((a, b) => a.localeCompare(b, 'en', { numeric: true }));
  const place = new Map(names.map((name, index) => [name, index]));
  const label = names.length <= 60 ? 12 + Math.max(...names.map((name) => draw.measureText(name).width)) : 4;
  const w = (width - label) / Math.max(names.length, 1);
  const h = Math.min(w, (height - 4) / Math.max(rows.length, 1), 60);
  const gap = w > 6 && h > 6 ? 1 : 0;
  const sorted = [...rows].sort((a, b) => place.get(a.node) - place.get(b.node));
  cells = { names, sorted, label, w, h };
  sorted.forEach((row, y) => {
    if (label > 4 && h >= 9) {
      draw.fillStyle = ink;
      draw.fillText(row.node, 2, y * h + h / 2 + 4);
    }
    row.names.forEach((name, index) => {
      draw.fillStyle = COLOURS[page.causes[row.causes.charCodeAt(index) - 97]] || '#888';
      draw.fillRect(label + place.get(name) * w, y * h, Math.max(w - gap, 0.5), Math.max(h - gap, 0.5));
    });
    if (row.error) {
      draw.fillStyle = '#8883';
      draw.fillRect(label, y * h, width - label, Math.max(h - gap, 0.5));
    }
  });
  if (label > 4 && rows.length === 1) {
    draw.fillStyle = ink;
    names.forEach((name, index) => {
      draw.save();
      draw.translate(label + index * w + w / 2, h + 8);
      draw.rotate(Math.PI / 4);
      draw.fillText(name, 0, 8);
      draw.restore();
    });
  }
}

function point(event) {
  if (!cells) return;
  const box = $('heat').getBoundingClientRect();
  const row = cells.sorted[Math.floor((event.clientY - box.top) / cells.h)];
  const name = cells.names[Math.floor((event.clientX - box.left - cells.label) / cells.w)];
  if (!row || !name) return;
  const index = row.names.indexOf(name);
  const said = row.error || (index < 0 ? 'itself' : page.causes[row.causes.charCodeAt(index) - 97]);
  $('cell').textContent = `${row.node} → ${name}: ${said}`;
}

function legend() {
  const shown = new Set(page.matrix.flatMap((row) => [...row.causes]));
  $('legend').replaceChildren(...[...shown].sort().flatMap((letter) => {
    const word = page.causes[letter.charCodeAt(0) - 97];
    const key = document.createElement('span');
    key.className = 'key';
    key.style.background = COLOURS[word];
    return [key, word];
  }));
}

function leases() {
  const wanted = $('filter').value.toLowerCase();
  const rows = page.leases
    .filter((lease) => [lease.node, ...lease.subnets, ...lease.public_addresses].join(' ').toLowerCase().includes(wanted))
    .map((lease) => [lease.subnets.join(' '), lease.node || '(flannel)', lease.public_addresses.join(' '), lease.epoch]);
  table('leases', ['Subnet', `Node (${rows.length})`, 'Underlay', 'Claim'], rows);
}

function show() {
  const { status, mesh } = page;
  document.title = `${status.node} · fabricd`;
  $('node').textContent = status.node;
  $('state').textContent = status.ready ? 'ready' : 'not ready';
  $('state').className = `badge ${status.ready ? 'good' : 'bad'}`;
  const network = status.network ? `${status.network.spaces.join(' ')} · VNI ${status.network.vni} · UDP ${status.network.port}` : '';
  $('network').textContent = `${network} · ${status.peers_programmed} of ${status.peers.length} peers programmed`;
  const lines = [...(status.reason ? [status.reason] : []), ...status.warnings, ...(mesh.limits ? [mesh.limits] : [])];
  $('warnings').replaceChildren(...lines.map((line) => Object.assign(document.createElement('li'), { textContent: line })));
  legend();
  topology();
  heat();
  const troubles = status.peers.filter((peer) => peer.state !== 'programmed')
    .map((peer) => [peer.node || peer.subnets.join(' '), peer.state, peer.reason, 'fabricctl peers']);
  const bad = mesh.peers.filter((peer) => peer.fix).map((peer) => [peer.node, [peer.cause, 'doubt'], peer.evidence, peer.fix]);
  const rows = [...troubles, ...bad];
  table('bad', ['Peer', 'What', 'Evidence', 'Fix'], rows.length ? rows.slice(0, 200) : [['nothing', '', '', '']]);
  leases();
  table('events', ['When', 'About', 'What'], page.events.map((event) => [
    new Date(event.unix_millis).toLocaleTimeString(), event.kind,
    [`${event.subject} ${event.message}`, event.warning ? 'doubt' : ''],
  ]));
}

async function refresh() {
  try {
    const answer = await fetch('page.json');
    if (!answer.ok) throw new Error(answer.statusText);
    page = await answer.json();
    show();
    $('age').textContent = new Date().toLocaleTimeString();
  } catch (error) {
    $('age').textContent = `no answer from fabricd: ${error.message}`;
  }
  // Seldom where there is much to show, and not at all in a hidden tab.
  const rest = page && page.leases.length > 500 ? 10000 : 2000;
  setTimeout(() => (document.hidden ? document.addEventListener('visibilitychange', refresh, { once: true }) : refresh()), rest);
}

$('filter').addEventListener('input', leases);
$('heat').addEventListener('mousemove', point);
window.addEventListener('resize', () => page && show());
refresh();
