// An HTTP server with timers, a worker thread and a pool that computes; it checks itself.
//
// Usage: node serving.js, which says "ready PORT". GET answers JSON:
//
//   /count      how often this was asked, by this connection and by all
//   /check      whether all is right: {"wrong": [...], "beats", "slept", "hashed", "worked", "kept"}
//   /sleep/MS   answers when a timer of so many milliseconds has run out, with how long that was
//   /echo       POST: the SHA-256 of what was sent, as it came
//   /end        closes the server, which then ends with status 0
'use strict';

const crypto = require('node:crypto');
const fs = require('node:fs');
const http = require('node:http');
const {Worker, isMainThread, parentPort} = require('node:worker_threads');

const BEAT_MS = 5;
const N_KEPT = 2000;

function work() {
  // A worker thread, an isolate of its own: answers n by the sum of all numbers up to n.
  parentPort.on('message', (n) => {
    let sum = 0;
    for (let i = 1; i <= n; i++) sum += i;
    parentPort.postMessage([n, sum]);
  });
}

const wrong = new Set();
const counts = {beats: 0, slept: 0, hashed: 0, worked: 0, kept: 0};

function beat() {
  let last = process.hrtime.bigint();
  setInterval(() => {
    const now = process.hrtime.bigint();
    if (now < last) wrong.add('the clock went back');
    last = now;
    counts.beats++;
  }, BEAT_MS);
}

function sleep() {
  const began = performance.now();
  setTimeout(() => {
    if (performance.now() - began < 19) wrong.add('a timer was early');
    counts.slept++;
    sleep();
  }, 20);
}

// In the threads of the pool: the same input must always give the same.
function hash() {
  crypto.pbkdf2('password', 'salt', 2000, 32, 'sha256', (error, key) => {
    hash.wanted ??= crypto.pbkdf2Sync('password', 'salt', 2000, 32, 'sha256');
    if (error || !key.equals(hash.wanted)) wrong.add('a hash');
    counts.hashed++;
    fs.promises.readFile(__filename).then((text) => {
      hash.text ??= text;
      if (!text.equals(hash.text)) wrong.add('a file');
      setImmediate(hash);
    });
  });
}

function delegate() {
  const worker = new Worker(__filename);
  worker.on('message', ([n, sum]) => {
    if (sum !== n * (n + 1) / 2) wrong.add('the worker');
    counts.worked++;
    setTimeout(() => worker.postMessage(100000 + counts.worked % 1000), 1);
  });
  worker.on('error', () => wrong.add('the worker failed'));
  worker.unref();
  worker.postMessage(100000);
}

// Objects that are replaced all the time, so that garbage is collected.
const kept = new Map();
function keep() {
  for (let i = 0; i < 200; i++) {
    const key = counts.kept++;
    kept.set(key, {key, text: `number ${key} `.repeat(1 + key % 50), more: [key, {twice: 2 * key}]});
    kept.delete(key - N_KEPT);
  }
  setTimeout(keep, 1);
}

function checkKept() {
  for (const [key, {text, more}] of kept) {
    const right = text === `number ${key} `.repeat(1 + key % 50) && more[1].twice === 2 * key;
    if (!right) wrong.add(`object ${key}`);
  }
  if (kept.size > N_KEPT) wrong.add('too many objects');
}

let asked = 0;
const server = http.createServer((request, response) => {
  const say = (what) => response.end(JSON.stringify(what));
  response.setHeader('Content-Type', 'application/json');
  const [, name, argument] = request.url.split('/');
  if (name === 'count') {
    request.socket.asked = (request.socket.asked ?? 0) + 1;
    say({connection: request.socket.asked, all: ++asked});
  } else if (name === 'check') {
    checkKept();
    say({wrong: [...wrong], ...counts});
  } else if (name === 'sleep') {
    const began = performance.now();
    setTimeout(() => say({ms: performance.now() - began}), Number(argument));
  } else if (name === 'echo') {
    const sum = crypto.createHash('sha256');
    request.on('data', (part) => sum.update(part));
    request.on('end', () => say({sha256: sum.digest('hex')}));
  } else if (name === 'end') {
    response.setHeader('Connection', 'close');
    response.on('finish', () => process.exit(0));
    say({});
  }
});

function main() {
  server.keepAliveTimeout = 600000;
  beat();
  sleep();
  hash();
  delegate();
  keep();
  server.listen(0, '127.0.0.1', () => console.log(`ready ${server.address().port}`));
}

if (isMainThread) main(); else work();
