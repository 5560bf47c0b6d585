{# For kernels with bindings logits, options and seen, numbers used, cols, size and fold, and groups = size / fold. #}
const LOWEST: f32 = -3.4028234e38;
const NAN_KEY: u32 = 0xffffffffu;
const INFINITY_KEY: u32 = 0xff800000u;

var<workgroup> scratch: array<vec4<u32>, {{ size }}>;
var<workgroup> folded: array<vec4<u32>, {{ groups }}>;

// An integer that orders as x does.
fn key_of(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let magnitude = bits & 0x7fffffffu;
    var key = select(bits | 0x80000000u, ~bits, bits > 0x7fffffffu);
    key = select(key, 0x80000000u, magnitude == 0u);
    return select(key, NAN_KEY, magnitude > 0x7f800000u);
}

fn value_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, key > 0x7fffffffu));
}

fn keys_of(x: vec4<f32>) -> vec4<u32> {
    return vec4<u32>(key_of(x.x), key_of(x.y), key_of(x.z), key_of(x.w));
}

// The first of the largest of four.
fn first_of(keys: vec4<u32>) -> vec2<u32> {
    let most = max(max(keys.x, keys.y), max(keys.z, keys.w));
    let low = select(1u, 0u, keys.x == most);
    let high = select(3u, 2u, keys.z == most);
    return vec2<u32>(most, select(high, low, max(keys.x, keys.y) == most));
}

// Of two parts of a row: the largest logit, the sum of exp(logit - it), the largest score and its first index.
fn join(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    let top = max(a.x, b.x);
    let at = value_of(top);
    let from_a = select(bitcast<f32>(a.y) * exp(value_of(a.x) - at), bitcast<f32>(a.y), a.x == top);
    let from_b = select(bitcast<f32>(b.y) * exp(value_of(b.x) - at), bitcast<f32>(b.y), b.x == top);
    let is_a = a.z > b.z || (a.z == b.z && a.w < b.w);
    return vec4<u32>(top, bitcast<u32>(from_a + from_b), select(b.zw, a.zw, is_a));
}
{% set function = "join" %}
{% include "shared/over_all" %}

// Padding is -infinity.
fn logits_of(row: u32, col: u32) -> vec4<f32> {
{% if cols % 4 == 0 %}
    return logits_load(row * logits_stride + col);
{% else %}
    let valid = vec4<u32>(0u, 1u, 2u, 3u) + 4u * col < vec4<u32>({{ cols }}u);
    // A variable: WebGPU refuses constants that are no finite number.
    var lowest = 0xff800000u;
    return select(vec4<f32>(bitcast<f32>(lowest)), logits_load(row * logits_stride + col), valid);
{% endif %}
}

// Tokens seen before are less likely: Keskar et al., arXiv:1909.05858.
fn scores_of(x: vec4<f32>, row: u32, col: u32) -> vec4<f32> {
    let penalty = bitcast<f32>(options[1]);
    if (penalty == 1.0) {
        return x;
    }
    let word = seen_at(row * seen_stride + col / 8u) >> (4u * (col % 8u));
    let was_seen = (vec4<u32>(word) & vec4<u32>(1u, 2u, 4u, 8u)) != vec4<u32>();
    let worse = clamp(select(x * penalty, x / penalty, x > vec4<f32>()), vec4<f32>(LOWEST), vec4<f32>(-LOWEST));
    return select(x, worse, was_seen & (x >= vec4<f32>(LOWEST)));
}

// What a row is so far: its largest logit, the sum of exp(logit - it), the largest score and its first index; whether a logit is NaN.
struct Part {
    largest: f32,
    sum: f32,
    invalid: bool,
    top_key: u32,
    index: u32,
}

fn beginning() -> Part {
    return Part(LOWEST, 0.0, false, 0u, 0u);
}

fn with_four(part: Part, x: vec4<f32>, y: vec4<f32>, col: u32) -> Part {
    var p = part;
    p.invalid = p.invalid || any((bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u));
    p.largest = max(part.largest, max(max(x.x, x.y), max(x.z, x.w)));
    let e = exp(x - p.largest);
    p.sum = part.sum * exp(part.largest - p.largest) + ((e.x + e.y) + (e.z + e.w));
    let first = first_of(keys_of(y));
    if (first.x > part.top_key) {
        p.top_key = first.x;
        p.index = 4u * col + first.y;
    }
    return p;
}

fn packed(part: Part) -> vec4<u32> {
    let largest = select(key_of(part.largest), NAN_KEY, part.invalid);
    return vec4<u32>(largest, bitcast<u32>(part.sum), part.top_key, part.index);
}
