// Views of a network that changes shape: topology, health, river; one time slider, one selection.
// Reads what `Film.pack` wrote. Runs as an anywidget (`render`) and on a page without a kernel (`still` model below).

const VIRIDIS = ['440154', '482878', '3e4989', '31688e', '26828e', '1f9e89', '35b779', '6ece58', 'b5de2b', 'fde725']
const ILL = ['4c8fc0', 'a9cbe6', 'ece7dd', 'f6a55c', 'd95f02']
const DEPTH = ['0072b2', 'e69f00', '009e73', 'cc79a7', '56b4e9', 'd55e00', '888888']
const VIEWS = {topology: 'Topology', health: 'Health', river: 'River'}
const ACTS = {prune: 'Prune', clone: 'Clone', reset: 'Reset', regrow: 'Regrow', undo: 'Undo'}
const MOST = 600 // frames that a live view keeps
let made = 0

// ---- colours and words

function rgb(hex) { return [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16)) }

function scale(stops) {
  const c = stops.map(rgb)
  return Array.from({length: 256}, (_, i) => {
    const x = i / 255 * (c.length - 1), k = Math.min(Math.floor(x), c.length - 2)
    return `rgb(${c[k].map((a, j) => Math.round(a + (x - k) * (c[k + 1][j] - a))).join(',')})`
  })
}
const GOOD_TO_BAD = scale(ILL), LOW_TO_HIGH = scale(VIRIDIS)
const pick = (table, x) => table[Math.max(0, Math.min(255, Math.round(x * 255)))]

function say(v) {
  if (v === null || v === undefined || Number.isNaN(v)) return '–'
  const a = Math.abs(v)
  if (a === 0) return '0'
  if (a >= 1e5 || a < 1e-3) return v.toExponential(1)
  return a >= 100 ? v.toFixed(0) : a >= 10 ? v.toFixed(1) : v.toFixed(a >= 1 ? 2 : 3)
}

function shorten(names) { // without the words that all of them share
  const parts = names.map(n => n.split('.'))
  if (names.length < 2) return names
  const common = (a, end) => {
    let k = 0
    while (a.every(p => p.length > k + 1) && new Set(a.map(p => end ? p[p.length - 1 - k] : p[k])).size === 1) k++
    return k
  }
  const hidden = parts.filter(p => p[p.length - 1] !== 'head')
  const first = common(parts, false)
  const last = common((hidden.length > 1 ? hidden : parts).map(p => p.slice(first)), true)
  const cut = first => parts.map(p => {
    const q = p.slice(first)
    return (p[p.length - 1] === 'head' || q.length <= last ? q : q.slice(0, q.length - last)).join('.')
  })
  const few = names.length <= 14 && first && cut(first).some(n => /^\d+$/.test(n)) // a number alone says little
  return cut(first - (few ? 1 : 0))
}

// ---- the packed film

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0))
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

const number = (q, m, levels) => q === 255 && levels < 255 ? NaN
  : m.log ? m.lo * (m.hi / m.lo) ** (q / levels) : m.lo + q / levels * (m.hi - m.lo)

async function unpack(p) { // frames: {step, epoch, n, values, health, bad, ids, twins, links}, by column name
  const raw = await inflate(p.data), F = p.steps.length, names = p.columns.map(c => c.name)
  let at = 0
  const plane = rows => { // (rows, frames), differences summed up
    const a = raw.slice(at, at += rows * F)
    for (let r = 0; r < rows; r++) for (let t = 1; t < F; t++) a[r * F + t] += a[r * F + t - 1]
    return (r, t) => a[r * F + t]
  }
  const bytes = k => raw.slice(at, at += k)
  const frames = p.steps.map((step, t) => ({step, epoch: p.epochs[t], n: {}, values: {}, health: {}, bad: {}, ids: {}, twins: {}, links: []}))
  const [lo, mid, hi] = [plane(names.length), plane(names.length), plane(names.length)]
  frames.forEach((f, t) => names.forEach((k, i) => { f.n[k] = lo(i, t) + 256 * mid(i, t) + 65536 * hi(i, t) }))
  for (const m of p.metrics) {
    for (const f of frames) f.values[m.name] = {}
    p.columns.forEach(c => {
      const a = plane(c.cells)
      frames.forEach((f, t) => {
        const k = Math.min(c.cells, f.n[c.name])
        f.values[m.name][c.name] = Float32Array.from({length: k}, (_, i) => number(a(i, t), m, p.shades))
      })
    })
  }
  for (const m of p.health) {
    const v = plane(p.layers.length), bad = plane(p.layers.length)
    frames.forEach((f, t) => {
      f.health[m.name] = p.layers.map((_, i) => number(v(i, t), m, 254))
      f.bad[m.name] = p.layers.map((_, i) => number(bad(i, t), {lo: 0, hi: 1}, p.shades))
    })
  }
  for (const [j, i, k] of p.twins) {
    const partner = bytes(k), like = bytes(k)
    frames[j].twins[names[i]] = Array.from(partner, (u, x) => [u, like[x] / 254])
  }
  for (const [j, k] of p.links) {
    const a = bytes(5 * k)
    frames[j].links = Array.from({length: k}, (_, x) => Array.from(a.slice(5 * x, 5 * x + 5)))
    frames[j].own = true
  }
  const now = {}
  let links = []
  const ids = new Map()
  p.ids.forEach(([j, i, runs]) => ids.set(`${j} ${i}`, runs.flatMap(([a, k]) => Array.from({length: k}, (_, x) => a + x))))
  frames.forEach((f, t) => {
    names.forEach((k, i) => {
      if (ids.has(`${t} ${i}`)) now[k] = ids.get(`${t} ${i}`)
      f.ids[k] = now[k] || null
    })
    if (f.own) links = f.links
    f.links = links
  })
  return {title: p.title, columns: p.columns, metrics: p.metrics, layers: p.layers, health: p.health, arrows: p.arrows, edits: p.edits, frames}
}

function append(film, one) { // a live frame, itself a packed film of one frame
  const f = one.frames[0], last = film.frames[film.frames.length - 1]
  film.columns = one.columns; film.arrows = one.arrows; film.layers = one.layers.length ? one.layers : film.layers
  const range = (have, m) => { // scales only widen
    const old = have.find(x => x.name === m.name)
    if (!old) have.push(m)
    else if (m.name !== 'active' && !m.name.endsWith('fraction')) {
      old.lo = Math.min(old.lo, m.lo); old.hi = Math.max(old.hi, m.hi); old.log = old.log && m.log && old.lo > 0
    }
  }
  one.metrics.forEach(m => range(film.metrics, m)); one.health.forEach(m => range(film.health, m))
  if (last && last.step === f.step) film.frames.pop()
  film.frames.push(f)
  for (const e of one.edits) film.edits.push({...e, at: film.frames.length - 1})
  if (film.frames.length > MOST) {
    film.frames = film.frames.filter((_, i) => i % 2 === 0 || i === film.frames.length - 1)
    for (const e of film.edits) e.at = Math.min(film.frames.length - 1, Math.ceil(e.at / 2))
  }
}

// ---- small helpers for the page

function el(tag, attrs = {}, ...inside) {
  const svg = ['svg', 'text', 'rect', 'path', 'line', 'g', 'circle', 'title'].includes(tag)
  const e = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
  for (const [k, v] of Object.entries(attrs)) {
    if (k.startsWith('on')) e.addEventListener(k.slice(2), v)
    else if (v !== null && v !== undefined && v !== false) e.setAttribute(k, v === true ? '' : v)
  }
  e.append(...inside)
  return e
}

const text = (x, y, words, attrs = {}) => el('text', {x, y, ...attrs}, words)
const fit = (words, width) => {
  const k = Math.floor(width / 6.3)
  return words.length <= k ? words : k < 3 ? '' : '…' + words.slice(words.length - k + 1)
}

// ---- the widget

function create({model, el: root}) {
  const own = `plv${++made}`
  const s = {film: null, time: 0, view: model.get('view') || 'topology', metric: '', wish: model.get('metric') || '', selected: null, follow: true,
             preview: null, width: 0, areas: []}
  const label = (id, words) => el('label', {for: `${own}-${id}`}, words)
  const tabs = Object.entries(VIEWS).map(([k, words]) => el('button', {
    type: 'button', role: 'tab', id: `${own}-${k}`, 'data-view': k, 'aria-controls': `${own}-stage`, onclick: () => { show(k); tabs.find(b => b.dataset.view === k).focus() }
  }, words))
  const metric = el('select', {id: `${own}-metric`, onchange: () => { s.wish = metric.value; save('metric', s.wish); draw() }})
  const canvas = el('canvas', {'aria-hidden': 'true'}), over = el('svg', {'aria-hidden': 'true'})
  const stage = el('div', {class: 'plv-stage', id: `${own}-stage`, tabindex: 0, role: 'application', 'aria-describedby': `${own}-live`}, canvas, over)
  const legend = el('div', {class: 'plv-legend'})
  const marks = el('div', {class: 'plv-marks', role: 'group', 'aria-label': 'edits'})
  const slider = el('input', {type: 'range', min: 0, step: 1, id: `${own}-time`, 'aria-label': 'time', 'data-lm-suppress-shortcuts': 'true'})
  const clock = el('output', {for: `${own}-time`, class: 'plv-clock'})
  const play = el('button', {type: 'button', class: 'plv-play', 'aria-label': 'play', onclick: () => toggle()}, '▶')
  const panel = el('section', {class: 'plv-panel', 'aria-label': 'selection'})
  const live = el('div', {class: 'plv-live', id: `${own}-live`, role: 'status', 'aria-live': 'polite'})
  const choose = el('span', {class: 'plv-choose'}, label('metric', 'colour'), metric)
  const box = el('div', {class: 'plv', 'data-lm-suppress-shortcuts': 'true', role: 'group', 'aria-label': 'network over time'},
    el('div', {class: 'plv-head'}, el('div', {role: 'tablist', 'aria-label': 'view', class: 'plv-tabs'}, ...tabs), choose),
    el('div', {class: 'plv-body'}, el('div', {class: 'plv-main'}, stage, legend,
      el('div', {class: 'plv-time'}, play, el('div', {class: 'plv-track'}, marks, slider), clock)), panel), live)
  root.replaceChildren(box)

  const save = (k, v) => { model.set(k, v); model.save_changes() }
  const frame = () => s.film.frames[s.time]
  const column = () => s.selected && s.film.columns.find(c => c.name === s.selected.column)
  const theme = name => getComputedStyle(box).getPropertyValue(name).trim()

  // where the selected unit is in a frame: its place among the cells, -1 if it is not there
  function placeIn(f, sel = s.selected) {
    if (!sel || sel.unit === null || !f.n[sel.column]) return -1
    const ids = f.ids[sel.column], k = cellsOf(f, sel.column)
    if (ids && ids.length === k) return ids.indexOf(sel.unit)
    return sel.unit < k ? sel.unit : -1
  }
  function cellsOf(f, name) {
    const c = s.film.columns.find(x => x.name === name)
    return c ? Math.min(c.cells, f.n[name] || 0) : 0
  }
  function numberOf(f, name, place) { const ids = f.ids[name]; return ids && ids.length === cellsOf(f, name) ? ids[place] : place }
  function called(f, name, place) { // words for a cell
    const k = cellsOf(f, name), n = f.n[name], axis = s.film.columns.find(c => c.name === name).axis
    const what = axis === 'head' ? 'head' : axis === 'output' ? 'output' : 'unit'
    if (k === n) return `${what} ${place}`
    return `${what}s ${Math.floor(place * n / k)}–${Math.floor((place + 1) * n / k) - 1}`
  }

  // ---- time

  function go(t, from) {
    s.time = Math.max(0, Math.min(s.film.frames.length - 1, t))
    s.follow = s.time === s.film.frames.length - 1
    if (from !== 'slider') slider.value = s.time
    save('time', s.time)
    draw()
  }
  let timer = null
  function toggle() {
    if (timer) { clearInterval(timer); timer = null }
    else {
      if (s.time === s.film.frames.length - 1) go(0)
      const step = Math.max(1, Math.round(s.film.frames.length / 120))
      timer = setInterval(() => {
        if (!box.isConnected || s.time >= s.film.frames.length - 1) return toggle()
        go(s.time + step)
      }, 80)
    }
    play.textContent = timer ? '❚❚' : '▶'
    play.setAttribute('aria-label', timer ? 'pause' : 'play')
  }
  slider.addEventListener('input', () => go(+slider.value, 'slider'))

  function show(view, quiet) {
    s.view = view
    tabs.forEach(b => { const on = b.dataset.view === view; b.setAttribute('aria-selected', on); b.tabIndex = on ? 0 : -1 })
    stage.setAttribute('aria-labelledby', `${own}-${view}`)
    choose.hidden = view !== 'topology'
    if (!quiet) save('view', view)
    if (s.film) draw()
  }
  tabs.forEach((b, i) => b.addEventListener('keydown', e => {
    const to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1}[e.key]
    if (to === undefined) return
    e.preventDefault()
    const next = tabs[(to + tabs.length) % tabs.length]
    show(next.dataset.view); next.focus()
  }))

  function select(name, unit, quiet) { // unit: its number, null for the whole layer
    s.selected = name === null ? null : {column: name, unit}
    s.preview = null
    const place = s.film ? placeIn(frame()) : -1
    if (!quiet) save('selected', name === null ? [] : [name, unit === null ? -1 : place])
    draw()
    live.textContent = spoken()
  }
  function spoken() {
    if (!s.selected) return 'nothing selected'
    const f = frame(), p = placeIn(f), m = s.metric && f.values[s.metric]
    if (!f.n[s.selected.column]) return `${s.selected.column}: not there at step ${f.step}`
    if (s.selected.unit === null || s.view !== 'topology') return `${s.selected.column}: ${f.n[s.selected.column]} wide at step ${f.step}`
    if (p < 0) return `${s.selected.column}, unit number ${s.selected.unit}: not there at step ${f.step}`
    const v = m && m[s.selected.column] ? say(m[s.selected.column][p]) : 'nothing known'
    return `${s.selected.column}, ${called(f, s.selected.column, p)}: ${s.metric.replaceAll('_', ' ')} ${v}`
  }

  // ---- drawing

  function surface(height) {
    const w = s.width, ratio = window.devicePixelRatio || 1
    canvas.width = Math.round(w * ratio); canvas.height = Math.round(height * ratio)
    canvas.style.width = `${w}px`; canvas.style.height = `${height}px`; stage.style.height = `${height}px`
    over.setAttribute('viewBox', `0 0 ${w} ${height}`); over.setAttribute('width', w); over.setAttribute('height', height)
    over.replaceChildren()
    const g = canvas.getContext('2d')
    g.setTransform(ratio, 0, 0, ratio, 0, 0)
    g.clearRect(0, 0, w, height)
    s.areas = []
    return g
  }

  function colourOf(m) {
    const span = m.log ? Math.log(m.hi / m.lo) : m.hi - m.lo || 1
    return v => pick(LOW_TO_HIGH, m.log ? Math.log(Math.max(v, m.lo) / m.lo) / span : (v - m.lo) / span)
  }

  function layout(f) { // where each column stands
    const cols = s.film.columns.filter(c => f.n[c.name]), most = Math.max(...s.film.frames.map(x => Math.max(...Object.values(x.n))))
    const least = Math.min(...cols.map(c => f.n[c.name]))
    const root = most > 12 * least, size = n => root ? Math.sqrt(n) : n
    const full = Math.max(110, Math.min(330, (root ? 1e9 : most * 24)))
    const left = 10, pitch = (s.width - 2 * left) / s.film.columns.length, short = shorten(s.film.columns.map(c => c.name))
    const longest = 6.4 * Math.max(...short.map(n => n.length)), dense = longest > pitch - 6, top = 26
    const arcs = !f.links.length && s.film.arrows.length < 80 && s.film.arrows.some(([i, j]) => j !== i + 1) ? 24 : 0
    const deep = arcs + (dense ? 24 + Math.min(100, .62 * longest) : 34)
    const wide = Math.max(2, Math.min(54, pitch * (pitch < 14 ? .8 : .46)))
    const at = {}
    s.film.columns.forEach((c, i) => {
      const n = f.n[c.name]
      if (!n) return
      const h = Math.max(4, full * size(n) / size(most))
      at[c.name] = {x: left + pitch * (i + .5) - wide / 2, y: top + (full - h) / 2, w: wide, h, k: Math.min(c.cells, n), n, i}
    })
    return {at, root, pitch, height: top + full + deep, top, full, dense, short, arcs}
  }

  function topology() {
    const f = frame(), L = layout(f), g = surface(L.height), fg = theme('--plv-fg'), none = theme('--plv-none')
    const m = s.film.metrics.find(x => x.name === s.metric), colour = m ? colourOf(m) : null
    const links = f.links.length > 0, cols = s.film.columns
    if (!links) {
      for (const [i, j] of s.film.arrows) {
        const a = at(L, cols[i]), b = at(L, cols[j])
        if (!a || !b) continue
        g.fillStyle = fg; g.globalAlpha = .055
        if (j === i + 1) {
          g.beginPath(); g.moveTo(a.x + a.w, a.y); g.lineTo(b.x, b.y); g.lineTo(b.x, b.y + b.h); g.lineTo(a.x + a.w, a.y + a.h); g.fill()
        } else if (s.film.arrows.length < 80) {
          const y = L.top + L.full + 3, rise = Math.min(22, 5 + 3 * (j - i))
          g.globalAlpha = .3; g.strokeStyle = fg; g.lineWidth = 1
          g.beginPath(); g.moveTo(a.x + a.w / 2, a.y + a.h + 2); g.bezierCurveTo(a.x + a.w / 2, y + rise, b.x + b.w / 2, y + rise, b.x + b.w / 2, b.y + b.h + 2); g.stroke()
        }
      }
    } else {
      g.strokeStyle = fg
      for (const [i, u, j, v, strength] of f.links) {
        const a = at(L, cols[i]), b = at(L, cols[j])
        if (!a || !b) continue
        const chosen = s.selected && ((cols[i].name === s.selected.column && u === placeIn(f)) || (cols[j].name === s.selected.column && v === placeIn(f)))
        const y0 = a.y + (u + .5) * a.h / a.k, y1 = b.y + (v + .5) * b.h / b.k, x0 = a.x + a.w, x1 = b.x, far = Math.abs(j - i) > 1 ? 26 : 0
        g.strokeStyle = chosen ? theme('--plv-mark') : fg
        g.globalAlpha = chosen ? .95 : .08 + .42 * strength / 254; g.lineWidth = chosen ? 1.6 : .5 + strength / 254
        g.beginPath(); g.moveTo(x0, y0)
        g.bezierCurveTo(x0 + (x1 - x0) * .4, y0 - far, x1 - (x1 - x0) * .4, y1 - far, x1, y1); g.stroke()
      }
    }
    g.globalAlpha = 1
    for (const c of cols) {
      const b = at(L, c)
      if (!b) continue
      const v = m && f.values[m.name][c.name], each = b.h / b.k, gap = each >= 5 ? 1 : 0
      for (let u = 0; u < b.k; u++) {
        g.fillStyle = v && v.length && !Number.isNaN(v[Math.min(u, v.length - 1)]) ? colour(v[Math.min(u, v.length - 1)]) : none
        g.fillRect(b.x, b.y + u * each, b.w, each - gap + (gap ? 0 : .35))
      }
      g.strokeStyle = fg; g.globalAlpha = .28; g.lineWidth = 1; g.strokeRect(b.x - .5, b.y - .5, b.w + 1, b.h + 1 - gap); g.globalAlpha = 1
      s.areas.push({...b, name: c.name})
    }
    names(L, f)
    ring(L, f)
  }
  const at = (L, c) => c && L.at[c.name]

  function names(L, f) {
    const all = s.film.columns, short = L.short, every = Math.max(1, Math.ceil(18 / L.pitch))
    const digits = Math.ceil((7.5 * `${Math.max(...all.map(c => f.n[c.name] || 0))}`.length + 6) / L.pitch)
    const mine = s.selected ? all.findIndex(c => c.name === s.selected.column) : -1
    const due = (i, each) => i === mine || (i % each === 0 && !(mine >= 0 && Math.abs(mine - i) < each))
    all.forEach((c, i) => {
      const b = L.at[c.name]
      if (!b) return
      const x = b.x + b.w / 2, y = L.top + L.full + L.arcs + 16, cls = i === mine ? 'plv-strong' : ''
      if (due(i, digits)) over.append(text(x, b.y - 7, `${b.n}`, {'text-anchor': 'middle', class: `plv-number ${cls}`}))
      if (!due(i, every)) return
      const words = short[i] || c.name
      if (!L.dense) over.append(el('text', {x, y, 'text-anchor': 'middle', class: cls}, words, el('title', {}, c.name)))
      else over.append(el('text', {x: 0, y: 0, transform: `translate(${x + 3} ${y - 4}) rotate(-38)`, 'text-anchor': 'end', class: cls}, fit(words, Math.min(155, (x - 6) / .79))))
    })
  }

  function ring(L, f) {
    if (!s.selected || !L.at[s.selected.column]) return
    const b = L.at[s.selected.column], p = placeIn(f), each = b.h / b.k
    const around = (u, cls) => over.append(el('rect', {x: b.x - 2.5, y: b.y + u * each - 1.5, width: b.w + 5, height: Math.max(3, each + 2), class: cls, rx: 1.5}))
    if (s.selected.unit === null) return over.append(el('rect', {x: b.x - 4, y: b.y - 4, width: b.w + 8, height: b.h + 8, class: 'plv-ring', rx: 3}))
    if (p < 0) return
    for (const [u, like] of twinsOf(f, p)) if (like > .95) around(u, 'plv-twin')
    around(p, 'plv-ring')
  }

  function twinsOf(f, p) { // [[place, likeness]], of the nearest earlier look
    const name = s.selected.column
    let t = s.film.frames.indexOf(f)
    while (t >= 0 && !s.film.frames[t].twins[name]) t--
    if (t < 0) t = s.film.frames.findIndex(x => x.twins[name])
    if (t < 0) return []
    const then = s.film.frames[t], was = then.ids[name] || [], now = f.ids[name] || [], list = then.twins[name]
    const mine = was.length ? was.indexOf(now.length ? now[p] : p) : p
    if (mine < 0 || !list[mine]) return []
    const out = list.map(([u, like], x) => x === mine ? [u, like] : u === mine ? [x, like] : null).filter(Boolean)
    const seen = new Map(out.map(([u, like]) => [now.length && was.length ? now.indexOf(was[u]) : u, like]))
    return [...seen].filter(([u, like]) => u >= 0 && u !== p && like > .2).sort((a, b) => b[1] - a[1]).slice(0, 4)
  }

  function axis(x0, x1, y) { // steps below a time axis
    const F = s.film.frames.length, places = [0, .25, .5, .75, 1].map(q => Math.round(q * (F - 1)))
    const seen = [...new Set(x1 - x0 < 150 ? [0, F - 1] : places)]
    seen.forEach((t, k) => over.append(text(x0 + (F > 1 ? t / (F - 1) : .5) * (x1 - x0), y, `${s.film.frames[t].step}`,
      {'text-anchor': F === 1 ? 'middle' : k === 0 ? 'start' : k === seen.length - 1 ? 'end' : 'middle', class: 'plv-faint'})))
  }

  function health() {
    const {layers, health: metrics, frames} = s.film
    if (!metrics.length) {
      surface(90)
      return over.append(text(12, 44, 'This film holds no metrics of whole layers.', {class: 'plv-faint'}))
    }
    const rows = Math.max(3.2, Math.min(26, 330 / layers.length)), short = shorten(layers)
    const side = Math.min(150, Math.max(...short.map(n => n.length)) * 6.4 + 16), gap = 14, across = Math.min(metrics.length, Math.max(1, Math.floor((s.width - side) / 132)))
    const lines = Math.ceil(metrics.length / across), wide = (s.width - side - 10 - gap * (across - 1)) / across, tall = layers.length * rows
    const block = 36 + tall + 24, g = surface(lines * block + 4), every = Math.max(1, Math.ceil(14 / rows))
    metrics.forEach((m, k) => {
      const x = side + (k % across) * (wide + gap), y = 36 + Math.floor(k / across) * block, F = frames.length, c = m.good ? null : colourOf(m)
      g.fillStyle = theme('--plv-soft')
      g.fillRect(x, y, wide, tall - (rows > 6 ? 1 : 0))
      frames.forEach((f, t) => {
        const v = f.health[m.name], bad = f.bad[m.name]
        if (!v) return
        const a = x + t / F * wide, b = x + (t + 1) / F * wide
        for (let i = 0; i < layers.length; i++) {
          if (v[i] === undefined || Number.isNaN(v[i])) continue
          g.fillStyle = m.good ? pick(GOOD_TO_BAD, bad[i]) : c(v[i])
          g.fillRect(a, y + i * rows, b - a + .4, rows - (rows > 6 ? 1 : -.3))
        }
      })
      const now = x + (s.time + .5) / F * wide
      over.append(el('line', {x1: now, x2: now, y1: y - 3, y2: y + tall + 3, class: 'plv-now'}))
      const pickd = s.selected ? layerOf(s.selected.column) : -1, v = frame().health[m.name]
      const words = m.name.replaceAll('_', ' ')
      over.append(el('text', {x, y: y - 20, class: 'plv-strong'}, words.length * 6.6 > wide ? `${words.slice(0, Math.max(3, Math.floor(wide / 6.6) - 1))}…` : words, el('title', {}, words)))
      const value = pickd >= 0 && v ? `${say(v[pickd])}` : v ? `${say(Math.min(...v.filter(Number.isFinite)))} to ${say(Math.max(...v.filter(Number.isFinite)))}` : ''
      over.append(text(x, y - 6, value, {class: 'plv-faint'}))
      axis(x, x + wide, y + tall + 16)
      if (k % across === 0) layers.forEach((_, i) => {
        const chosen = i === pickd
        if (chosen || (i % every === 0 && !(pickd >= 0 && Math.abs(i - pickd) < every))) {
          over.append(el('text', {x: side - 8, y: y + (i + .5) * rows + 4, 'text-anchor': 'end', class: chosen ? 'plv-strong' : ''}, fit(short[i], side - 10), el('title', {}, layers[i])))
        }
      })
      if (pickd >= 0) over.append(el('rect', {x: x - 1.5, y: y + pickd * rows - 1.5, width: wide + 3, height: rows + 2, class: 'plv-ring'}))
      s.areas.push({x, y, w: wide, h: tall, rows})
    })
  }
  function layerOf(name) { // the row of a column
    const i = s.film.layers.indexOf(name)
    return i >= 0 ? i : s.film.layers.findIndex(l => l.startsWith(name) || name.startsWith(l))
  }
  function columnOf(layer) {
    const c = s.film.columns.find(x => x.name === layer) || s.film.columns.find(x => x.name.startsWith(layer) || layer.startsWith(x.name))
    return c ? c.name : layer
  }

  function river() {
    const {columns, frames} = s.film, F = frames.length, side = 12, top = 16, full = 300
    const right = Math.min(.36 * s.width, 66 + 6.4 * Math.max(...shorten(columns.map(c => c.name)).map(n => n.length)))
    const g = surface(top + full + 26), x = t => side + (F > 1 ? t / (F - 1) : .5) * (s.width - side - right)
    const kept = columns.filter(c => c.axis !== 'output' || columns.length < 3)
    const total = f => kept.reduce((a, c) => a + (f.n[c.name] || 0), 0), most = Math.max(...frames.map(total))
    const base = frames.map(f => top + full * (1 - total(f) / most) / 2), few = kept.length <= DEPTH.length, short = shorten(kept.map(c => c.name))
    let spoke = -99
    kept.forEach((c, k) => {
      const upper = [...base]
      frames.forEach((f, t) => { base[t] += full * (f.n[c.name] || 0) / most })
      const chosen = s.selected && s.selected.column === c.name
      g.fillStyle = few ? `#${DEPTH[k]}` : pick(LOW_TO_HIGH, .05 + .9 * k / (kept.length - 1))
      g.globalAlpha = !s.selected || chosen ? .92 : .6
      g.beginPath(); g.moveTo(x(0), upper[0])
      const edge = (list, order) => order.forEach((t, i) => {
        const back = order[0] !== 0
        if (i && !back) g.lineTo(x(t), list[t - 1])
        if (i && back) g.lineTo(x(t + 1), list[t])
        g.lineTo(x(t), list[t])
      })
      const forth = frames.map((_, t) => t)
      edge(upper, forth); edge(base, [...forth].reverse()); g.closePath(); g.fill()
      g.globalAlpha = 1; g.strokeStyle = theme('--plv-bg'); g.lineWidth = kept.length > 40 ? .3 : 1; g.stroke()
      const last = F - 1, mid = (upper[last] + base[last]) / 2, n = frame().n[c.name] || 0
      if (chosen || (mid - spoke > 13 && base[last] > upper[last])) {
        over.append(el('text', {x: s.width - right + 8, y: mid + 4, class: chosen ? 'plv-strong' : ''}, fit(short[k], right - 54), el('title', {}, c.name)))
        over.append(text(s.width - 4, mid + 4, `${n}`, {'text-anchor': 'end', class: `plv-number ${chosen ? 'plv-strong' : ''}`}))
        spoke = mid
      }
      s.areas.push({name: c.name, upper, lower: [...base], x})
    })
    over.append(el('line', {x1: x(s.time), x2: x(s.time), y1: top - 8, y2: top + full + 8, class: 'plv-now'}))
    axis(x(0), x(F - 1), top + full + 20)
  }

  function bar(table) { return `linear-gradient(to right, ${[0, .125, .25, .375, .5, .625, .75, .875, 1].map(x => pick(table, x)).join(', ')})` }
  function keys() {
    const key = (...inside) => el('span', {class: 'plv-key'}, ...inside)
    const strip = (table, lo, hi) => key(el('span', {class: 'plv-end'}, lo), el('span', {class: 'plv-bar', style: `background:${bar(table)}`, role: 'img', 'aria-label': `colours from ${lo} to ${hi}`}), el('span', {class: 'plv-end'}, hi))
    const box = words => key(el('span', {class: 'plv-swatch'}), words)
    const out = []
    if (s.view === 'topology') {
      const m = s.film.metrics.find(x => x.name === s.metric)
      if (m) out.push(key(m.about + (m.log ? ' (logarithmic)' : '')), strip(LOW_TO_HIGH, say(m.lo), say(m.hi)))
      if (!m || Object.values(frame().values[m.name]).some(v => v.some(Number.isNaN)) || Object.keys(frame().n).some(k => !frame().values[m.name][k] || !frame().values[m.name][k].length)) out.push(box('not measured'))
      const L = layout(frame()), many = s.film.columns.some(c => frame().n[c.name] > c.cells)
      out.push(key(`height: ${L.root ? 'root of the ' : ''}width${many ? '; a cell is several neighbouring units' : ''}`))
    } else if (s.view === 'health') {
      if (s.film.health.some(m => m.good)) out.push(strip(GOOD_TO_BAD, 'healthy', 'unhealthy'))
      if (s.film.health.some(m => !m.good)) out.push(strip(LOW_TO_HIGH, 'low', 'high'))
      if (s.film.health.length) out.push(key('from left to right: training steps'))
    } else out.push(key('thickness: width of the layer; from left to right: training steps; first layer on top'))
    legend.replaceChildren(...out)
  }

  function timeline() {
    const F = s.film.frames.length, f = frame()
    slider.max = F - 1; slider.value = s.time; slider.disabled = F < 2; play.disabled = F < 2
    const words = `step ${f.step}` + (f.epoch === null || f.epoch === undefined ? '' : `, epoch ${f.epoch}`)
    clock.textContent = words
    slider.setAttribute('aria-valuetext', words)
    const here = new Map()
    s.film.edits.forEach(e => here.set(e.at, [...(here.get(e.at) || []), e]))
    marks.hidden = !here.size
    const many = here.size > 40
    marks.replaceChildren(...[...here].map(([t, list]) => {
      const words = `step ${list[0].step}: ${list.map(e => e.text).join('; ')}`
      const on = s.selected && list.some(e => e.column === s.selected.column)
      return el('button', {type: 'button', class: `plv-mark${t === s.time ? ' plv-on' : ''}${on ? ' plv-mine' : ''}`, style: `left:${F > 1 ? t / (F - 1) * 100 : 50}%`,
        title: words, 'aria-label': words, tabindex: many ? -1 : 0, onclick: () => { go(t); live.textContent = words }})
    }))
  }

  function spark(name, unit) { // the history of a unit
    const W = 214, H = 62, m = s.film.metrics.find(x => x.name === s.metric)
    const whole = unit === null || !m
    const v = s.film.frames.map(f => {
      if (whole) return f.n[name] || NaN
      const p = placeIn(f, {column: name, unit}), a = f.values[m.name] && f.values[m.name][name]
      return p < 0 || !a || !a.length ? NaN : a[Math.min(p, a.length - 1)]
    })
    const ok = v.filter(Number.isFinite)
    if (!ok.length) return el('p', {class: 'plv-faint'}, 'no history')
    const lo = whole ? 0 : Math.min(...ok), hi = Math.max(...ok), F = v.length
    const x = t => 3 + (F > 1 ? t / (F - 1) : .5) * (W - 6), y = a => H - 5 - (hi > lo ? (a - lo) / (hi - lo) : .5) * (H - 12)
    let d = '', on = false
    v.forEach((a, t) => { if (!Number.isFinite(a)) on = false; else { d += `${on ? 'L' : 'M'}${x(t).toFixed(1)} ${y(a).toFixed(1)}`; on = true } })
    const words = `${whole ? 'width' : s.metric.replaceAll('_', ' ')} over time, from ${say(ok[0])} to ${say(ok[ok.length - 1])}`
    const parts = [el('path', {d, class: 'plv-line'}), el('line', {x1: x(s.time), x2: x(s.time), y1: 0, y2: H, class: 'plv-now'})]
    if (Number.isFinite(v[s.time])) parts.push(el('circle', {cx: x(s.time), cy: y(v[s.time]), r: 3, class: 'plv-dot'}))
    return el('div', {}, el('svg', {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: 'img', 'aria-label': words, class: 'plv-spark'}, ...parts),
      el('p', {class: 'plv-faint plv-range'}, `${whole ? 'width' : s.metric.replaceAll('_', ' ')}: ${say(lo)} to ${say(hi)}`))
  }

  function details() {
    const f = frame(), out = []
    if (!s.selected) {
      out.push(el('h3', {}, s.film.title || 'Selection'), el('p', {class: 'plv-faint'}, s.view === 'topology'
        ? 'Choose a unit: click, or arrow keys.' : 'Choose a layer: click, or arrow keys up and down.'))
      const units = Object.values(f.n).reduce((a, b) => a + b, 0)
      out.push(table([['layers', Object.values(f.n).filter(Boolean).length], ['units', units.toLocaleString('en')], ['time points', s.film.frames.length], ['edits', s.film.edits.length]]))
    } else {
      const {column: name, unit} = s.selected, p = placeIn(f), whole = unit === null || s.view !== 'topology'
      out.push(el('h3', {}, whole ? name : p < 0 ? `unit no. ${unit}` : called(f, name, p)))
      if (!whole) out.push(el('p', {class: 'plv-faint plv-name'}, name))
      if (whole) out.push(table([['width', f.n[name] || 0]]))
      else if (p < 0) out.push(el('p', {}, 'not there at this time'))
      else out.push(table(s.film.metrics.map(m => { const a = f.values[m.name][name]; return [m.name.replaceAll('_', ' '), a && a.length ? say(a[Math.min(p, a.length - 1)]) : '–'] })))
      out.push(spark(name, whole ? null : unit))
      const about = s.film.edits.filter(e => e.column === name && (whole || !e.units.length || e.units.includes(unit)))
      if (about.length) {
        out.push(el('h4', {}, 'Edits'), el('ul', {}, ...about.slice(-5).map(e => el('li', {}, el('button', {type: 'button', class: 'plv-link', onclick: () => go(e.at)}, `step ${e.step}`), ` ${e.text}`))))
      }
      const twins = whole || p < 0 ? [] : twinsOf(f, p)
      if (twins.length) {
        out.push(el('h4', {}, 'Most alike'), el('ul', {}, ...twins.slice(0, 3).map(([u, like]) => el('li', {}, el('button', {type: 'button', class: 'plv-link',
          onclick: () => select(name, numberOf(f, name, u))}, called(f, name, u)), ` ${like.toFixed(2)}${like > .95 ? ', a twin' : ''}`))))
      }
    }
    if (model.get('live')) out.push(...acts())
    panel.replaceChildren(...out)
  }
  function table(rows) { return el('table', {}, ...rows.map(([k, v]) => el('tr', {}, el('th', {scope: 'row'}, k), el('td', {}, `${v}`)))) }

  function acts() {
    const f = frame(), latest = s.time === s.film.frames.length - 1, chosen = s.selected && s.selected.unit !== null && placeIn(f) >= 0
    const single = chosen && f.n[s.selected.column] === cellsOf(f, s.selected.column)
    const able = k => k === 'undo' || (latest && s.selected && (k === 'regrow' || single))
    const buttons = Object.entries(ACTS).map(([k, words]) => el('button', {type: 'button', 'data-act': k, disabled: !able(k), onclick: () => ask(k)}, words))
    const out = [el('h4', {}, 'Act'), el('div', {class: 'plv-acts', role: 'group', 'aria-label': 'act on the selection'}, ...buttons)]
    if (!latest) out.push(el('p', {class: 'plv-faint'}, 'Acts are done to the network of now: move to the last time point.'))
    if (s.preview) {
      const p = s.preview
      out.push(el('div', {class: `plv-preview${p.error ? ' plv-bad' : ''}`, role: 'alert'}, el('p', {}, p.text), ...(p.rows ? [table(p.rows)] : []),
        ...(p.ask ? [el('div', {class: 'plv-acts'}, el('button', {type: 'button', class: 'plv-do', onclick: () => { send({type: 'do', verb: p.verb, column: p.column, index: p.index}) }}, 'Do it'),
          el('button', {type: 'button', onclick: () => { s.preview = null; details() }}, 'Leave it'))] : [])))
    }
    return out
  }
  const send = m => { s.preview = {text: 'The kernel is at work …'}; details(); model.send(m) }
  function ask(verb) {
    const f = frame(), p = placeIn(f)
    send({type: 'preview', verb, column: s.selected ? s.selected.column : null, index: p < 0 ? [] : [p]})
  }

  function draw() {
    if (!s.film || !s.width) return
    const known = s.film.metrics.map(m => m.name)
    s.metric = known.includes(s.wish) ? s.wish : known[0] || ''
    if (metric.options.length !== s.film.metrics.length || [...metric.options].some((o, i) => o.value !== s.film.metrics[i].name)) {
      metric.replaceChildren(...s.film.metrics.map(m => el('option', {value: m.name, title: m.about}, m.name.replaceAll('_', ' '))))
    }
    metric.value = s.metric
    s.view === 'topology' ? topology() : s.view === 'health' ? health() : river()
    keys(); timeline(); details()
    stage.setAttribute('aria-label', `${VIEWS[s.view]}: ${s.film.columns.length} layers. Arrow keys choose. ${spoken()}`)
  }

  // ---- mouse and keyboard on the picture

  stage.addEventListener('click', e => {
    const r = stage.getBoundingClientRect(), x = e.clientX - r.left, y = e.clientY - r.top
    if (s.view === 'topology') {
      const a = s.areas.find(b => x >= b.x - 4 && x <= b.x + b.w + 4 && y >= b.y - 20 && y <= b.y + b.h + 4)
      if (!a) return select(null)
      return select(a.name, y < b0(a) ? null : numberOf(frame(), a.name, Math.min(a.k - 1, Math.max(0, Math.floor((y - a.y) / a.h * a.k)))))
    }
    if (s.view === 'health') {
      const a = s.areas.find(b => y >= b.y && y < b.y + b.h && x <= b.x + b.w)
      if (!a) return
      if (x >= a.x) go(Math.floor((x - a.x) / a.w * s.film.frames.length))
      return select(columnOf(s.film.layers[Math.floor((y - a.y) / a.rows)]), null)
    }
    const F = s.film.frames.length, f = s.areas.length ? s.areas[0].x : null
    if (!f) return
    const t = Math.max(0, Math.min(F - 1, Math.round((x - f(0)) / Math.max(1, f(F - 1) - f(0)) * (F - 1))))
    const a = s.areas.find(b => y >= b.upper[t] && y < b.lower[t])
    if (x <= f(F - 1) + 4) go(t)
    if (a) select(a.name, null)
  })
  const b0 = a => a.y - 2

  stage.addEventListener('keydown', e => {
    const cols = s.view === 'health' && s.film.layers.length ? s.film.layers.map(columnOf) : s.film.columns.map(c => c.name).filter(k => frame().n[k])
    const i = s.selected ? cols.indexOf(s.selected.column) : -1, f = frame(), k = i < 0 ? 0 : cellsOf(f, cols[i]), p = Math.max(0, placeIn(f))
    let done = true
    const across = to => { const name = cols[Math.max(0, Math.min(cols.length - 1, to))]; return [name, cellsOf(f, name)] }
    if (s.view !== 'topology') {
      if (e.key === 'ArrowDown' || e.key === 'ArrowUp') select(across(i < 0 ? 0 : i + (e.key === 'ArrowDown' ? 1 : -1))[0], null)
      else if (e.key === 'ArrowRight' || e.key === 'ArrowLeft') go(s.time + (e.key === 'ArrowRight' ? 1 : -1))
      else if (e.key === 'Home') go(0)
      else if (e.key === 'End') go(s.film.frames.length - 1)
      else done = e.key === 'Escape' && s.selected ? (select(null), true) : false
    } else if (e.key.startsWith('Arrow') && i < 0) select(cols[0], numberOf(f, cols[0], 0))
    else if (e.key === 'ArrowDown' || e.key === 'ArrowUp') select(cols[i], numberOf(f, cols[i], Math.max(0, Math.min(k - 1, p + (e.key === 'ArrowDown' ? 1 : -1)))))
    else if (e.key === 'ArrowRight' || e.key === 'ArrowLeft') {
      const [name, n] = across(i + (e.key === 'ArrowRight' ? 1 : -1))
      select(name, numberOf(f, name, Math.min(n - 1, Math.round(p / Math.max(1, k - 1) * (n - 1)))))
    } else if (e.key === 'Home' && i >= 0) select(cols[i], numberOf(f, cols[i], 0))
    else if (e.key === 'End' && i >= 0) select(cols[i], numberOf(f, cols[i], k - 1))
    else if (e.key === 'Enter' && i >= 0) { const b = panel.querySelector('button:not([disabled])'); if (b) b.focus(); live.textContent = spoken() }
    else if (e.key === 'Escape' && s.selected) select(null)
    else done = false
    if (done) { e.preventDefault(); e.stopPropagation() }
  })
  panel.addEventListener('keydown', e => { if (e.key === 'Escape') { stage.focus(); e.stopPropagation() } })

  // ---- what comes from the kernel

  async function load() {
    const packed = model.get('state')
    if (!packed || !packed.data) return
    try { s.film = await unpack(packed) } catch (e) { root.textContent = `this browser cannot show the view: ${e.message}`; return }
    s.time = Math.max(0, Math.min(s.film.frames.length - 1, s.follow ? Infinity : s.time))
    draw()
  }
  const taken = () => {
    const [name, place] = model.get('selected') || []
    if (name === undefined || !s.film) { if (s.selected) select(null, null, true); return }
    const f = frame(), unit = place < 0 || place === undefined ? null : numberOf(f, name, place)
    if (!s.selected || s.selected.column !== name || s.selected.unit !== unit) select(name, unit, true)
  }
  let queue = Promise.resolve()
  const message = m => {
    if (m.type === 'frame' && s.film) queue = queue.then(async () => { append(s.film, await unpack(m.frame)); if (s.follow) s.time = s.film.frames.length - 1; else s.time = Math.min(s.time, s.film.frames.length - 1); draw() })
    if (m.type === 'preview') { s.preview = m; queue = queue.then(() => details()) }
  }
  const changes = {state: () => { queue = queue.then(load) }, selected: taken, live: () => s.film && draw(),
    time: () => { const t = model.get('time'); if (s.film && t !== s.time) { s.time = Math.max(0, Math.min(s.film.frames.length - 1, t)); s.follow = s.time === s.film.frames.length - 1; draw() } },
    view: () => { if (model.get('view') !== s.view) show(model.get('view'), true) },
    metric: () => { if (model.get('metric') !== s.wish) { s.wish = model.get('metric'); draw() } }}
  for (const [k, fn] of Object.entries(changes)) model.on(`change:${k}`, fn)
  model.on('msg:custom', message)

  const watch = new ResizeObserver(() => {
    const w = Math.floor(stage.parentElement.clientWidth)
    if (w > 0 && w !== s.width) { s.width = w; draw() }
  })
  watch.observe(stage.parentElement)
  const dark = window.matchMedia('(prefers-color-scheme: dark)'), redraw = () => draw()
  dark.addEventListener('change', redraw)
  const themed = new MutationObserver(redraw)
  themed.observe(document.body, {attributes: true, attributeFilter: ['class', 'data-jp-theme-light', 'data-jp-theme-name']})
  show(s.view, true)
  queue = queue.then(load).then(() => { const t = model.get('time'); if (s.film && t >= 0 && t < s.film.frames.length) { s.time = t; s.follow = t === s.film.frames.length - 1 } taken(); draw() })
  return () => {
    if (timer) clearInterval(timer)
    watch.disconnect(); themed.disconnect(); dark.removeEventListener('change', redraw)
    for (const [k, fn] of Object.entries(changes)) model.off(`change:${k}`, fn)
    model.off('msg:custom', message)
  }
}

// a model without a kernel: what it is told stays on the page
function still(values) {
  return {get: k => values[k], set: (k, v) => { values[k] = v }, save_changes() {}, send() {}, on() {}, off() {}}
}

export { still }
export default { render: create }
