// The map of neurons: decoder directions on a plane, coloured by best label.
(function () {
  'use strict';
  var box = document.getElementById('map');
  if (!box) { return; }
  var el = medsae.el, svg = medsae.svg, index = medsae.data.index, of = index.neurons, labels = index.labels;
  var shown = of.neuron.filter(function (i) { return of.x[i] !== null && !of.dead[i]; });
  if (!shown.length) { document.getElementById('map-section').hidden = true; return; }
  var SIDE = 600, EDGE = 12;
  function scale(values) {
    var low = Math.min.apply(null, values), high = Math.max.apply(null, values);
    return function (value) { return EDGE + (SIDE - 2 * EDGE) * (high > low ? (value - low) / (high - low) : 0.5); };
  }
  var sx = scale(shown.map(function (i) { return of.x[i]; })), sy = scale(shown.map(function (i) { return of.y[i]; }));
  var picture = svg('svg', { viewBox: '0 0 ' + SIDE + ' ' + SIDE, role: 'img', 'aria-label': 'Map of ' + shown.length + ' living neurons by decoder direction; the list of neurons holds the same.' });
  var places = shown.map(function (i) { return [sx(of.x[i]), SIDE - sy(of.y[i]), i]; });
  var groups = labels.concat(['no label']).map(function () { return svg('g', {}); });
  places.forEach(function (place) {
    var label = of.label[place[2]] === null ? labels.length : of.label[place[2]];
    groups[label].appendChild(svg('circle', { cx: place[0].toFixed(1), cy: place[1].toFixed(1), r: of.name[place[2]] ? 4.2 : 2.4, 'class': 'label-' + label + (of.name[place[2]] ? ' named' : '') }));
  });
  groups.forEach(function (group) { picture.appendChild(group); });
  var ring = svg('circle', { r: 7, 'class': 'ring', visibility: 'hidden' });
  picture.appendChild(ring);
  var told = el('p', { 'class': 'told', 'aria-hidden': 'true' }, 'Point at a neuron; click to open its card. Larger dots have a name.');
  box.appendChild(picture);
  box.appendChild(told);

  var hidden = {};
  var legend = el('div', { 'class': 'legend', role: 'group', 'aria-label': 'Labels on the map' });
  labels.forEach(function (label, i) {
    var n = shown.filter(function (neuron) { return of.label[neuron] === i; }).length;
    if (!n) { return; }
    var button = el('button', { type: 'button', 'aria-pressed': 'true', click: function () {
      hidden[i] = !hidden[i];
      groups[i].setAttribute('visibility', hidden[i] ? 'hidden' : 'visible');
      button.setAttribute('aria-pressed', String(!hidden[i]));
    } }, svg('svg', { viewBox: '0 0 10 10', 'aria-hidden': 'true' }, svg('circle', { cx: 5, cy: 5, r: 4.5, 'class': 'label-' + i })), label + ' (' + n + ')');
    legend.appendChild(button);
  });
  box.parentNode.insertBefore(legend, box.nextSibling);

  function nearest(event) {
    var at = picture.getBoundingClientRect(), unit = SIDE / at.width;
    var x = (event.clientX - at.left) * unit, y = (event.clientY - at.top) * unit, best = null, least = 196;
    places.forEach(function (place) {
      if (hidden[of.label[place[2]]]) { return; }
      var distance = Math.pow(place[0] - x, 2) + Math.pow(place[1] - y, 2);
      if (distance < least) { least = distance; best = place; }
    });
    return best;
  }
  picture.addEventListener('mousemove', function (event) {
    var place = nearest(event);
    ring.setAttribute('visibility', place ? 'visible' : 'hidden');
    picture.classList.toggle('over', Boolean(place));
    if (!place) { return; }
    ring.setAttribute('cx', place[0]);
    ring.setAttribute('cy', place[1]);
    var i = place[2];
    told.textContent = 'Neuron ' + i + (of.name[i] ? ' “' + of.name[i] + '”' : '') + (of.label[i] === null ? '' : ', best label ' + labels[of.label[i]] + ', r ' + medsae.number(of.r[i], 2));
  });
  picture.addEventListener('click', function (event) {
    var place = nearest(event);
    if (place) { location.href = 'neuron.html#' + place[2]; }
  });
}());
