// What every page needs: the data that the scripts of data/ put here, and small helpers. No text is ever markup.
(function () {
  'use strict';
  var SVG = 'http://www.w3.org/2000/svg';
  var medsae = (window.medsae = { data: {} });
  var waiting = {};

  medsae.put = function (name, payload) {
    medsae.data[name] = payload;
    (waiting[name] || []).forEach(function (then) { then(payload); });
    delete waiting[name];
  };

  // Load data/<name>.js once, then call back; `failed` where there is no such file.
  medsae.load = function (name, then, failed) {
    if (name in medsae.data) { then(medsae.data[name]); return; }
    if (waiting[name]) { waiting[name].push(then); return; }
    waiting[name] = [then];
    var script = document.createElement('script');
    script.src = 'data/' + name + '.js';
    script.onerror = function () { delete waiting[name]; failed(); };
    document.head.appendChild(script);
  };

  function made(node, attributes, children) {
    Object.keys(attributes || {}).forEach(function (key) {
      var value = attributes[key];
      if (value === null || value === undefined || value === false) { return; }
      if (typeof value === 'function') { node.addEventListener(key, value); } else { node.setAttribute(key, value === true ? '' : String(value)); }
    });
    children.forEach(function add(child) {
      if (Array.isArray(child)) { child.forEach(add); return; }
      if (child === null || child === undefined) { return; }
      node.appendChild(typeof child === 'object' ? child : document.createTextNode(String(child)));
    });
    return node;
  }
  medsae.el = function (tag, attributes) {
    return made(document.createElement(tag), attributes, [].slice.call(arguments, 2));
  };
  medsae.svg = function (tag, attributes) {
    return made(document.createElementNS(SVG, tag), attributes, [].slice.call(arguments, 2));
  };
  medsae.number = function (value, digits) {
    return value === null || value === undefined ? '–' : value.toFixed(digits === undefined ? 3 : digits);
  };
  medsae.percent = function (value, digits) {
    return value === null || value === undefined ? '–' : (100 * value).toFixed(digits === undefined ? 1 : digits) + ' %';
  };
  medsae.nameOf = function (neuron) {
    var of = medsae.data.index.neurons;
    return of.name[neuron] || (of.label[neuron] === null ? null : medsae.data.index.labels[of.label[neuron]]);
  };

  var dialog = document.getElementById('keys');
  var on = document.getElementById('keys-on');
  document.getElementById('keys-open').addEventListener('click', function () { dialog.showModal(); });
  document.getElementById('keys-close').addEventListener('click', function () { dialog.close(); });

  // Call `act` on single keys, unless the reader types, or has switched them off.
  medsae.onKey = function (act) {
    document.addEventListener('keydown', function (event) {
      var at = event.target;
      if (event.ctrlKey || event.metaKey || event.altKey || !on.checked || dialog.open) { return; }
      if (/^(INPUT|SELECT|TEXTAREA)$/.test(at.tagName) && at.type !== 'checkbox') { return; }
      if (act(event.key)) { event.preventDefault(); }
    });
  };
  medsae.onKey(function (key) {
    if (key === '?') { dialog.showModal(); return true; }
    if (key !== '/') { return false; }
    var search = document.getElementById('q');
    if (search) { search.focus(); } else { location.href = 'neurons.html#focus=1'; }
    return true;
  });
}());
