// The index: every neuron in one table, filtered by what the address holds.
(function () {
  'use strict';
  var el = medsae.el, index = medsae.data.index, of = index.neurons, labels = index.labels;
  var FIELDS = ['q', 'label', 'state', 'acc', 'named', 'dmin', 'dmax', 'emin', 'emax', 'shortcut'];
  var field = {};
  FIELDS.forEach(function (id) { field[id] = document.getElementById(id); });
  labels.forEach(function (label, i) { field.label.appendChild(el('option', { value: i }, label)); });

  function cell(shown, sorted, text) {
    return function (row, type) {
      if (type === 'display') { return shown(row); }
      if (type === 'filter') { return text ? text(row) : ''; }
      var value = sorted(row);
      return value === null ? (typeof value === 'string' ? '' : -Infinity) : value;
    };
  }
  function text(value) { return el('span', {}, value === null ? '–' : value); }
  function numeric(column, digits) {
    return cell(function (i) { return text(medsae.number(of[column][i], digits)); }, function (i) { return of[column][i]; });
  }
  function words(value) { return cell(function (i) { return text(value(i)); }, function (i) { return value(i) || '~'; }); }
  function labelOf(i) { return of.label[i] === null ? null : labels[of.label[i]]; }
  function detection(i) {
    return of.detection[i] === null ? '–'
      : medsae.percent(of.detection[i], 0) + ' (' + medsae.percent(of.detection_low[i], 0).replace(' %', '') + '–' + medsae.percent(of.detection_high[i], 0) + ')';
  }
  var columns = [
    { title: 'neuron', data: cell(function (i) { return el('a', { href: 'neuron.html#' + i }, i); }, function (i) { return i; }), type: 'num' },
    { title: 'name', data: words(function (i) { return of.name[i]; }), className: 'words' },
    { title: 'best label', data: words(labelOf), className: 'words' },
    { title: 'r', data: numeric('r', 2), type: 'num' },
    { title: 'AUROC', data: numeric('auroc'), type: 'num', className: 'wide' },
    { title: 'density', data: cell(function (i) { return text(medsae.percent(of.density[i])); }, function (i) { return of.density[i]; }), type: 'num', className: 'wide' },
    { title: 'entropy', data: numeric('entropy', 2), type: 'num', className: 'wide' },
    { title: 'detection', data: cell(function (i) { return text(detection(i)); }, function (i) { return of.detection[i]; }), type: 'num' },
    { title: 'state', data: words(function (i) { return of.dead[i] ? 'dead' : 'alive'; }), className: 'wide' },
    { title: 'shortcut', data: words(function (i) { return of.shortcut[i]; }), className: 'wide words' }
  ];

  // The filter travels in the address, so that a list can be shared and stepped back to.
  var asked = new URLSearchParams(location.hash.slice(1));
  FIELDS.forEach(function (id) {
    if (!asked.has(id)) { return; }
    if (field[id].type === 'checkbox') { field[id].checked = true; } else { field[id].value = asked.get(id); }
  });
  function state() {
    var told = {};
    FIELDS.forEach(function (id) {
      var of = field[id];
      if (of.type === 'checkbox' ? of.checked : of.value !== '') { told[id] = of.type === 'checkbox' ? '1' : of.value; }
    });
    return told;
  }
  function within(value, low, high, scale) {
    if (low === undefined && high === undefined) { return true; }
    return value !== null && (low === undefined || value >= low / scale) && (high === undefined || value <= high / scale);
  }
  var now = state();
  function kept(i) {
    if (now.q !== undefined) {
      var told = (i + ' ' + (of.name[i] || '') + ' ' + (labelOf(i) || '')).toLowerCase();
      if (!now.q.toLowerCase().trim().split(/\s+/).every(function (word) { return told.indexOf(word) >= 0; })) { return false; }
    }
    return (now.label === undefined || of.label[i] === Number(now.label))
      && (now.state === undefined || (now.state === 'dead') === Boolean(of.dead[i]))
      && (now.named === undefined || of.name[i] !== null)
      && (now.shortcut === undefined || of.shortcut[i] !== null)
      && within(of.detection[i], now.acc, undefined, 100)
      && within(of.density[i], now.dmin, now.dmax, 100)
      && within(of.entropy[i], now.emin, now.emax, 1);
  }

  var table = new DataTable('#neurons', {
    data: of.neuron, columns: columns, pageLength: 50, deferRender: true, autoWidth: false,
    order: [[7, 'desc'], [3, 'desc']],
    layout: { topStart: null, topEnd: null, bottomStart: 'paging', bottomEnd: null }
  });
  var count = document.getElementById('count');
  function filter() {
    now = state();
    table.search.fixed('filters', function (told, row) { return kept(row); });
    table.draw();
    var shown = table.rows({ search: 'applied' }).data().toArray();
    count.textContent = shown.length.toLocaleString('en') + ' of ' + of.neuron.length.toLocaleString('en') + ' neurons';
    history.replaceState(null, '', '#' + new URLSearchParams(now));
    try { sessionStorage.setItem('medsae-list', location.hash); } catch (error) { /* Not from disk in every browser. */ }
  }
  FIELDS.forEach(function (id) { field[id].addEventListener('input', filter); });
  document.getElementById('reset').addEventListener('click', function () {
    FIELDS.forEach(function (id) { if (field[id].type === 'checkbox') { field[id].checked = false; } else { field[id].value = ''; } });
    filter();
    field.q.focus();
  });
  document.getElementById('more').open = ['dmin', 'dmax', 'emin', 'emax', 'shortcut'].some(function (id) { return id in now; });
  filter();
  if (asked.has('focus')) { field.q.focus(); }
  document.documentElement.setAttribute('data-ready', '');
}());
