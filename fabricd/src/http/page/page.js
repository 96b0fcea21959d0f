// What the page shows is made from /page.json alone. Names come from other nodes: they are only ever set as text.
'use strict';

const COLOURS = {
  unknown: '#a8b0b9', no_daemon: '#7f8fa3', port_blocked: '#e5484d', mtu_black_hole: '#f08c2e', checksum_offload: '#d6409f',
  stale_mac: '#a05fd6', stale_fdb: '#7a63e8', own_filter: '#a5682a', peer_down: '#a3152b', asymmetric: '#e2b203',
  unknown_yet: '#c2708a', lossy: '#f5b041', route_override: '#5b5bd6', local_firewall: '#c0392b', port_closed: '#d35400', underlay_down: '#6e2b2b',
};
// A digit in the mesh is a round trip: each step is twice as long as the one before, the first a tenth of a millisecond.
const FINE = [...'0123456789'].map((digit) => `hsl(${140 + 10 * digit} 52% ${48 - digit}%)`);
const $ = (id) => document.getElementById(id);
let page = null;
let cellAt = () => undefined;

const word = (cell) => (cell >= 'a' ? page.causes[cell.charCodeAt(0) - 97] : 'fine');
const colour = (cell) => FINE[cell] || COLOURS[word(cell)] || COLOURS.unknown;
const most = (digit) => `${(0.1 * 2 ** digit).toFixed(1)} ms`;
const trip = (digit) => (digit === '9' ? `over ${most(8)}` : `up to ${most(digit)}`);
const ordered = (names) => names.map((_, index) => index)
  .sort((a, b) => names[a].localeCompare(names[b], 'en', { numeric: true }));

/// An element like `parent`'s, with text, inside of it.
function add(parent, tag, attributes, text) {
  const element = document.createElementNS(parent.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

function table(id, header, rows) {
  const body = document.createElement('tbody');
  const line = body.insertRow();
  header.forEach((name) => add(line, 'th', {}, name));
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach(([text, kind]) => add(line, 'td', { class: kind || '' }, text));
  }
  $(id).replaceChildren(body);
}

/// Up to sixty peers stand in a ring, with names; more fill the disc as seeds do a sunflower's. The picture is as high as
/// they need.
function topology() {
  const picture = $('topology');
  const own = page.mesh.rows.find((row) => row.node === page.status.node);
  const peers = ordered(page.mesh.names).filter((index) => own && own.cells[index] !== ' ');
  const ring = peers.length <= 60;
  const radius = Math.min(140, 60 + 10 * peers.length);
  const size = ring ? Math.max(3, Math.min(7, 150 / peers.length)) : 110 / Math.sqrt(peers.length);
  picture.replaceChildren();
  let [top, bottom] = [-40, 40];
  const [lines, dots] = [add(picture, 'g'), add(picture, 'g')];
  peers.forEach((index, place) => {
    const [name, cell] = [page.mesh.names[index], own.cells[index]];
    const angle = ring ? ((place + 0.5) / peers.length - 0.25) * 2 * Math.PI : place * Math.PI * (3 - Math.sqrt(5));
    const away = ring ? radius : 20 + 180 * Math.sqrt((place + 0.5) / peers.length);
    const [x, y] = [away * Math.cos(angle), away * Math.sin(angle)];
    const bad = cell >= 'd';
    // A name takes up to 70 more, in the same direction.
    const end = (ring ? away + 70 : away) * Math.sin(angle);
    [top, bottom] = [Math.min(top, end - 15), Math.max(bottom, end + 15)];
    if (ring || bad) {
      add(lines, 'line', { x2: x, y2: y, stroke: colour(cell), 'stroke-width': bad ? 2 : 1, opacity: bad ? 1 : 0.45 });
    }
    add(add(dots, 'circle', { cx: x, cy: y, r: size, fill: colour(cell) }), 'title', {}, `${name}: ${said(cell)}`);
    if (!ring) return;
    const left = Math.cos(angle) < -1e-9;
    const turn = (angle * 180) / Math.PI + (left ? 180 : 0);
    const text = name.length > 12 ? `${name.slice(0, 11)}…` : name;
    const at = { transform: `rotate(${turn}) translate(${(left ? -1 : 1) * (away + size + 4)} 3.5)` };
    add(picture, 'text', { ...at, 'text-anchor': left ? 'end' : 'start' }, text);
  });
  picture.setAttribute('viewBox', `-210 ${top} 420 ${bottom - top}`);
  picture.style.aspectRatio = 420 / (bottom - top);
  add(picture, 'circle', { r: 11, class: 'self' });
  add(picture, 'text', { y: 25, 'text-anchor': 'middle', 'font-weight': 'bold', 'paint-order': 'stroke', stroke: 'var(--card)', 'stroke-width': 4 }, page.status.node);
}

const said = (cell) => (cell === ' ' ? 'not probed' : cell <= '9' ? `fine, ${trip(cell)}` : word(cell));

/// What is shown where: all nodes by all nodes; while only this one has answered, its peers as a field.
function grid() {
  const { names, rows } = page.mesh;
  const all = ordered(names);
  if (rows.length > 1) {
    return ordered(rows.map((row) => row.node)).map((line) => all.map((index) => [rows[line], index]));
  }
  const peers = all.filter((index) => rows[0].cells[index] !== ' ').map((index) => [rows[0], index]);
  const across = Math.ceil(Math.sqrt(peers.length));
  return [...Array(across).keys()].map((y) => peers.slice(y * across, (y + 1) * across));
}

function heat() {
  const element = $('heat');
  const lines = grid();
  const whole = page.mesh.rows.length > 1;
  const scale = window.devicePixelRatio || 1;
  const width = element.getBoundingClientRect().width * scale;
  const draw = element.getContext('2d');
  const font = `${11 * scale}px system-ui, sans-serif`;
  draw.font = font;
  const across = lines.length ? lines[0].length : 1;
  const widest = Math.max(0, ...page.mesh.names.map((name) => draw.measureText(name).width)) + 8 * scale;
  const edge = whole && (width - widest) / across >= 10 * scale ? Math.min(widest, 120 * scale) : 0;
  // Few nodes need no large field, many have to fit the window.
  const most = Math.min((whole ? 64 : 120) * scale, (0.8 * window.innerHeight * scale - edge) / Math.max(1, lines.length));
  const size = Math.min((width - edge) / across, most);
  // To give it a size resets all of it.
  element.width = width;
  element.height = Math.ceil(edge + size * lines.length);
  element.style.height = `${element.height / scale}px`;
  draw.font = font;
  draw.textBaseline = 'middle';
  const gap = size > 5 * scale ? scale : 0;
  const at = (place) => Math.round(edge + place * size);
  cellAt = (left, top) => lines[Math.floor((top * scale - edge) / size)]?.[Math.floor((left * scale - edge) / size)];

  const ink = getComputedStyle(element).color;
  const write = (text, x, y, turn, room) => {
    draw.save();
    draw.translate(x, y);
    draw.rotate(turn);
    draw.fillStyle = ink;
    draw.fillText(text, 0, 0, room);
    draw.restore();
  };
  // What is bad is drawn last, and never too small to be seen.
  for (const turn of ['fine', 'bad']) {
    lines.forEach((line, y) => line.forEach(([row, index], x) => {
      const mark = row.cells[index] || ' ';
      const bad = mark >= 'd';
      if (bad !== (turn === 'bad') || (mark === ' ' && !row.error)) return;
      const least = bad ? 3 * scale : 0;
      draw.fillStyle = row.error ? '#8883' : colour(mark);
      draw.fillRect(at(x), at(y), Math.max(at(x + 1) - at(x) - gap, least), Math.max(at(y + 1) - at(y) - gap, least));
      if (!whole && size > widest) write(page.mesh.names[index], at(x) + 6 * scale, at(y + 0.5), 0, size);
    }));
  }
  if (edge) {
    lines.forEach((line, y) => write(line[0][0].node, 0, at(y + 0.5), 0, edge - 6 * scale));
    lines[0].forEach(([, index], x) => write(page.mesh.names[index], at(x + 0.5), edge - 6 * scale, -Math.PI / 2, edge - 6 * scale));
  }
  $('whose').textContent = whole ? 'A row is a node that probes, a column one that is probed.'
    : 'As this node sees its peers. All nodes are asked where --api-addr is set, in clusters of up to 500.';
}

function point(event) {
  const found = cellAt(event.offsetX, event.offsetY);
  if (!found) return;
  const [row, name, mark] = [found[0], page.mesh.names[found[1]], found[0].cells[found[1]]];
  $('cell').textContent = `${row.node} → ${name}: ${row.error || (row.node === name ? 'itself' : said(mark))}`;
}

function legend() {
  const shown = [...new Set(page.mesh.rows.flatMap((row) => [...row.cells]))].filter((cell) => cell !== ' ').sort();
  $('legend').replaceChildren();
  for (const cell of shown) {
    const entry = add($('legend'), 'span');
    add(entry, 'span', { class: 'key' }).style.background = colour(cell);
    entry.append(said(cell));
  }
}

function facts() {
  const { status } = page;
  const { network, lease, store } = status;
  const vtep = status.vteps[0];
  const all = {
    Peers: `${status.peers_programmed} of ${page.peers} programmed`,
    Subnet: lease ? lease.subnets.join(' ') : 'none',
    Network: network ? `${network.spaces.join(' ')}, VNI ${network.vni}, UDP ${network.port}` : 'unknown',
    VTEP: vtep ? `${vtep.device} on ${vtep.underlay_device}, MTU ${vtep.mtu}` : 'none',
    Store: store.connected ? `connected, revision ${store.revision}` : `away: ${store.reason}`,
    'Round trip': `${page.median_ms.toFixed(2)} ms`,
  };
  $('facts').replaceChildren();
  for (const [name, value] of Object.entries(all)) {
    const fact = add($('facts'), 'div');
    add(fact, 'dt', {}, name);
    add(fact, 'dd', {}, value);
  }
}

function leases() {
  const wanted = $('filter').value.toLowerCase();
  const rows = page.leases
    .map((lease) => [lease.subnets.join(' '), lease.node || '(flannel)', lease.public_addresses.join(' '), lease.epoch, lease.own])
    .filter((row) => row.join(' ').toLowerCase().includes(wanted));
  table('leases', ['Subnet', `Node (${rows.length})`, 'Underlay', 'Epoch'], rows.map((row) => {
    const own = row.pop() ? 'own' : '';
    return row.map((value) => [value, own]);
  }));
}

function show() {
  const { status } = page;
  document.title = `${status.node} · fabricd`;
  $('node').textContent = status.node;
  $('state').textContent = status.ready ? 'ready' : 'not ready';
  $('state').className = `badge ${status.ready ? 'good' : 'bad'}`;
  $('reason').textContent = status.reason;
  $('warnings').replaceChildren();
  [...status.warnings, page.limits].filter(Boolean).forEach((line) => add($('warnings'), 'li', {}, line));
  const rows = page.troubles.map(({ peer, what, evidence, fix }) => [[peer], [what, 'doubt'], [evidence, 'text'], [fix, 'text']]);
  $('troubles').hidden = rows.length === 0;
  table('bad', ['Peer', 'What', 'Evidence', 'Fix'], rows);
  facts();
  legend();
  topology();
  heat();
  leases();
  table('events', ['When', 'About', 'What'], page.events.map((event) => [
    [new Date(event.unix_millis).toTimeString().slice(0, 8), 'faint'], [event.kind, 'faint'],
    [`${event.subject} ${event.message}`, event.warning ? 'text doubt' : 'text'],
  ]));
}

async function refresh() {
  try {
    const answer = await fetch('page.json');
    if (!answer.ok) throw new Error(answer.statusText);
    page = await answer.json();
    show();
    $('age').textContent = new Date().toTimeString().slice(0, 8);
    document.body.classList.remove('away');
  } catch (error) {
    $('age').textContent = `no answer from fabricd: ${error.message}`;
    document.body.classList.add('away');
  }
  // More seldom where there is much to show, and not at all in a hidden tab.
  const rest = 2000 + (page ? 10 * page.leases.length : 0);
  setTimeout(() => (document.hidden ? document.addEventListener('visibilitychange', refresh, { once: true }) : refresh()), rest);
}

$('filter').addEventListener('input', leases);
$('heat').addEventListener('pointermove', point);
window.addEventListener('resize', () => page && show());
refresh();
