// A neuron's card, built from data/cards-<k>.js; the address's hash is the neuron's number.
(function () {
  'use strict';
  var el = medsae.el, svg = medsae.svg, number = medsae.number, percent = medsae.percent;
  var index = medsae.data.index, run = index.run, labels = index.labels, of = index.neurons;
  var card = document.getElementById('card'), told = document.getElementById('told');
  var overlay = true;
  var WARM = [213, 94, 0], COOL = [31, 106, 165];
  var ROLES = {
    top: 'Strongest radiographs', range: 'Across the activation range', silent: 'Radiographs on which it is silent'
  };
  var NAMES = { AP: 'AP rather than PA', lateral: 'lateral rather than frontal', male: 'male', age: 'age', site: 'site', devices: 'support devices' };

  function interval(low, high, show) { return low === null || low === undefined ? '' : ' (' + show(low) + ' – ' + show(high) + ')'; }

  // Signed values of a map, row by row; null where there is none.
  function values(image) {
    if (!image.map) { return null; }
    return Array.prototype.map.call(atob(image.map), function (c) { var v = c.charCodeAt(0); return (v > 127 ? v - 256 : v) * image.scale; });
  }
  function strongest(map) {
    var best = 0, h = run.grid[0], w = run.grid[1];
    map.forEach(function (v, i) { if (v > map[best]) { best = i; } });
    var y = Math.floor(best / w) / (h - 1), x = (best % w) / (w - 1);
    return (y < 0.34 ? 'upper' : y > 0.66 ? 'lower' : 'middle') + ' ' + (x < 0.34 ? 'left' : x > 0.66 ? 'right' : 'centre');
  }
  // Drawn at the grid's size; the browser smooths it over the square as it scales.
  function heat(map, most) {
    var canvas = el('canvas', { width: run.grid[1], height: run.grid[0], 'aria-hidden': 'true' });
    var context = canvas.getContext('2d'), pixels = context.createImageData(run.grid[1], run.grid[0]);
    map.forEach(function (v, i) {
      var colour = v > 0 ? WARM : COOL;
      pixels.data.set([colour[0], colour[1], colour[2], Math.round(190 * Math.min(1, Math.abs(v) / most))], 4 * i);
    });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }
  function shot(image, most) {
    var map = values(image);
    var says = 'Radiograph ' + image.id + ', activation ' + number(image.value) + (map ? ', strongest ' + strongest(map) : '');
    var pictured = run.images !== 'none' && !image.unreadable;
    var box = el('span', { 'class': 'shot', role: pictured ? null : 'img', 'aria-label': pictured ? null : says },
      pictured ? el('img', { src: 'radiographs/' + encodeURIComponent(image.id) + '.jpg', alt: says, loading: 'lazy' }) : null,
      map ? heat(map, most) : null);
    var answer = image.answer === null ? null : el('div', {}, 'model: ', el('span', { 'class': image.answer }, image.answer),
      image.p_yes === null ? '' : ' (p ' + number(image.p_yes, 2) + ')');
    return el('li', {}, box, el('div', {}, image.role === 'silent' ? 'silent' : number(image.value)), answer);
  }
  function gallery(neuron) {
    var most = 0, shown = [];
    neuron.images.forEach(function (image) { (values(image) || []).forEach(function (v) { most = Math.max(most, Math.abs(v)); }); });
    if (most) {
      var box = el('input', { type: 'checkbox', id: 'overlay', change: function () { overlay = box.checked; card.classList.toggle('plain', !overlay); } });
      box.checked = overlay;
      shown.push(el('p', {}, el('label', {}, box, ' show where it fires '), el('span', { 'class': 'note' }, '−' + most.toPrecision(2) + ' ', el('span', { 'class': 'ramp', 'aria-hidden': 'true' }), ' +' + most.toPrecision(2) + ' of the pre-activation a position, above or below the average radiograph')));
    }
    Object.keys(ROLES).forEach(function (role) {
      var images = neuron.images.filter(function (image) { return image.role === role; });
      if (!images.length) { return; }
      var split = role === 'top' ? run.splits.top : run.splits.range;
      shown.push(el('h3', {}, ROLES[role] + ' (' + split + ' split)'));
      shown.push(el('ul', { 'class': 'images' }, images.map(function (image) { return shot(image, most || 1); })));
    });
    return shown;
  }

  function labelChart(rows) {
    var ROW = 20, LEFT = 190, RIGHT = 540, height = ROW * rows.length + 26;
    function x(r) { return LEFT + (r + 1) / 2 * (RIGHT - LEFT); }
    var picture = svg('svg', { viewBox: '0 0 560 ' + height, 'class': 'chart', role: 'img', 'aria-label': 'Correlation with each label; the table below holds the numbers.' });
    rows.forEach(function (row, i) {
      var y = 6 + ROW * i;
      picture.appendChild(svg('text', { x: LEFT - 8, y: y + 12, 'text-anchor': 'end' }, labels[row[0]]));
      if (row[1] !== null) { picture.appendChild(svg('rect', { x: Math.min(x(0), x(row[1])), y: y + 2, width: Math.abs(x(row[1]) - x(0)), height: 12, 'class': 'bar' })); }
    });
    picture.appendChild(svg('line', { x1: x(0), x2: x(0), y1: 4, y2: height - 22, 'class': 'axis' }));
    [-1, -0.5, 0, 0.5, 1].forEach(function (tick) { picture.appendChild(svg('text', { x: x(tick), y: height - 6, 'text-anchor': 'middle' }, tick)); });
    return picture;
  }
  function histogram(bins) {
    var most = Math.max.apply(null, bins.counts), LEFT = 40, WIDTH = 500 / bins.counts.length;
    var picture = svg('svg', { viewBox: '0 0 560 160', 'class': 'chart', role: 'img', 'aria-label': 'Histogram of its activations on the radiographs of the test split on which it fires, 0 to ' + number(bins.max) + '; at most ' + most + ' a bar.' });
    bins.counts.forEach(function (count, i) {
      var tall = most ? 120 * count / most : 0;
      picture.appendChild(svg('rect', { x: LEFT + i * WIDTH + 1, y: 128 - tall, width: WIDTH - 2, height: tall, 'class': 'bar' }));
    });
    picture.appendChild(svg('line', { x1: LEFT, x2: 540, y1: 128, y2: 128, 'class': 'axis' }));
    [[LEFT, 144, '0', 'start'], [540, 144, number(bins.max), 'end'], [290, 158, 'activation', 'middle'], [LEFT - 4, 14, most, 'end'], [LEFT - 4, 128, '0', 'end']].forEach(function (at) {
      picture.appendChild(svg('text', { x: at[0], y: at[1], 'text-anchor': at[3] }, at[2]));
    });
    return picture;
  }
  function table(caption, heads, rows) {
    return el('div', { 'class': 'scroll', role: 'region', 'aria-label': caption, tabindex: '0' }, el('table', {}, el('caption', {}, caption),
      el('thead', {}, el('tr', {}, heads.map(function (head, i) { return el('th', { scope: 'col', 'class': i ? 'n' : null }, head); }))),
      el('tbody', {}, rows.map(function (row) { return el('tr', {}, row.map(function (cell, i) { return i ? el('td', { 'class': 'n' }, cell) : el('th', { scope: 'row' }, cell); })); }))));
  }
  function fact(name, value, small) { return el('div', {}, el('dt', {}, name), el('dd', {}, value, small ? el('small', {}, small) : null)); }

  function build(neuron) {
    var name = neuron.name, tested = neuron.detection, figures = neuron.figures, i = neuron.neuron;
    var title = name && name.concept ? name.concept : neuron.alive ? 'unnamed neuron' : 'dead neuron';
    var parts = [el('h1', { id: 'card-title' }, 'Neuron ' + i + ': ' + title)];
    if (name && name.description) { parts.push(el('blockquote', {}, name.description)); }
    if (!neuron.alive) { parts.push(el('p', { 'class': 'flag' }, 'It fires on no radiograph of the test split.')); }
    if (!neuron.candidate && neuron.why_not) { parts.push(el('p', { 'class': 'note' }, 'Not a candidate for a name: ' + neuron.why_not + '.')); }
    if (name && name.status !== 'answered') { parts.push(el('p', { 'class': 'note' }, 'No name: the reply was ' + name.status + (name.reason ? ' (' + name.reason + ')' : '') + '.')); }
    var best = of.label[i] === null ? null : labels[of.label[i]];
    parts.push(el('dl', { 'class': 'facts' },
      tested ? fact('Detection accuracy', percent(tested.balanced_accuracy, 0), '95 %: ' + percent(tested.low, 0) + ' – ' + percent(tested.high, 0) + '; chance 50 %') : null,
      fact('Best label', best || '–', best ? 'r ' + number(of.r[i], 2) + ', AUROC ' + number(of.auroc[i]) : null),
      fact('Fires on', percent(figures.density), figures.n_firing + ' radiographs of the test split'),
      fact('Entropy', number(figures.entropy, 2), 'noise ' + number(figures.entropy_floor, 2) + ', over ' + figures.n_labels + ' labels')));
    var flagged = neuron.acquisition.filter(function (row) { return row[3]; });
    if (flagged.length) {
      parts.push(el('p', { 'class': 'flag' }, 'Possible shortcut: it follows ' + flagged.map(function (row) { return NAMES[row[0]]; }).join(', ') + ' at |r| above 0.2 on both splits.'));
    }
    parts.push(el('h2', {}, 'Radiographs'), neuron.images.length ? gallery(neuron) : el('p', { 'class': 'note' }, 'None are shown for this neuron.'));
    if (tested) {
      parts.push(el('h2', {}, 'Is the name right?'), table('Answers of the model on radiographs of other patients than those that gave the name', ['figure', 'value', '95 % interval'], [
        ['says yes where it fires (TPR)', percent(tested.tpr, 0), percent(tested.tpr_low, 0) + ' – ' + percent(tested.tpr_high, 0)],
        ['says no where it is silent (TNR)', percent(tested.tnr, 0), percent(tested.tnr_low, 0) + ' – ' + percent(tested.tnr_high, 0)],
        ['AUROC of the probability of yes', number(tested.auroc), number(tested.auroc_low) + ' – ' + number(tested.auroc_high)],
        ['with another neuron’s name', percent(tested.shuffled, 0), ''],
        ['q (share of false discoveries)', tested.q === null ? '–' : tested.q.toPrecision(2), ''],
        ['answers: firing, silent', tested.n_positive + ', ' + tested.n_negative, tested.n_unparsed + ' unparsed, ' + tested.n_failed + ' failed']]));
    }
    parts.push(el('h2', {}, 'Labels'), el('p', { 'class': 'note' }, 'Pearson correlation of its activation with each label, test split.'), labelChart(neuron.labels),
      table('Correlation and ROC-AUC by label', ['label', 'r', 'AUROC', '95 % interval', 'r (validation)', 'known'], neuron.labels.map(function (row) {
        return [labels[row[0]], number(row[1], 2), number(row[2]), row[3] === null ? '–' : number(row[3]) + ' – ' + number(row[4]), number(row[5], 2), row[6]];
      })));
    if (neuron.histogram && neuron.histogram.max) { parts.push(el('h2', {}, 'Activations'), histogram(neuron.histogram)); }
    if (neuron.acquisition.length) {
      parts.push(el('h2', {}, 'How the radiographs were made'), table('Correlation with acquisition; beyond 0.2 on both splits it may be a shortcut', ['variable', 'r (test)', 'r (validation)', 'possible shortcut'], neuron.acquisition.map(function (row) {
        return [NAMES[row[0]] + (row[0] === 'site' && neuron.site ? ' ' + neuron.site : ''), number(row[1], 2), number(row[2], 2), row[3] ? 'yes' : 'no'];
      })));
    }
    if (neuron.nearest.length) {
      parts.push(el('h2', {}, 'Nearest neurons'), table('Neurons of the most similar decoder direction', ['neuron', 'cosine', 'name or best label'], neuron.nearest.map(function (row) {
        return [el('a', { href: '#' + row[0] }, row[0]), number(row[1], 2), medsae.nameOf(row[0]) || '–'];
      })));
    }
    if (name && name.reply) { parts.push(el('details', {}, el('summary', {}, 'The model’s raw reply (' + name.model + ')'), el('pre', {}, name.reply))); }
    parts.push(el('p', { 'class': 'note' }, 'The strongest radiographs are of the ' + run.splits.top + ' split and gave the name; all figures and the other radiographs are of the ' + run.splits.range + ' split. No patient is in two splits.'));
    return parts;
  }

  function step(id, to) {
    var link = document.getElementById(id);
    if (to < 0 || to >= run.n_neurons) { link.removeAttribute('href'); } else { link.href = '#' + to; }
  }
  function show() {
    var asked = location.hash.slice(1), i = Number(asked === '' ? 0 : asked);
    function say(sentence) { card.replaceChildren(el('h1', { id: 'card-title' }, 'No such neuron'), el('p', {}, sentence)); told.textContent = sentence; }
    if (!Number.isInteger(i) || i < 0 || i >= run.n_neurons) {
      say('The neurons are numbered 0 to ' + (run.n_neurons - 1) + '; choose one in the list.');
      return;
    }
    step('previous', i - 1);
    step('next', i + 1);
    document.getElementById('place').textContent = (i + 1) + ' of ' + run.n_neurons;
    medsae.load('cards-' + Math.floor(i / run.per_file), function (cards) {
      if (location.hash.slice(1) !== asked) { return; }
      var neuron = cards[i % run.per_file];
      card.replaceChildren.apply(card, [].concat.apply([], build(neuron)));
      card.classList.toggle('plain', !overlay);
      document.title = card.querySelector('h1').textContent + ' · neuron atlas';
      told.textContent = card.querySelector('h1').textContent;
      document.documentElement.setAttribute('data-ready', i);
    }, function () { say('The file data/cards-' + Math.floor(i / run.per_file) + '.js is missing from this folder.'); });
  }
  medsae.onKey(function (key) {
    if (key === 'o') { var box = document.getElementById('overlay'); if (box) { box.click(); } return true; }
    var id = key === 'ArrowRight' || key === 'j' ? 'next' : key === 'ArrowLeft' || key === 'k' ? 'previous' : null;
    if (id && document.getElementById(id).href) { document.getElementById(id).click(); return true; }
    return false;
  });
  try { document.getElementById('back').href = 'neurons.html' + (sessionStorage.getItem('medsae-list') || ''); } catch (error) { /* Not from disk in every browser. */ }
  window.addEventListener('hashchange', show);
  show();
}());
