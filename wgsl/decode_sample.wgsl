// The next token of every text, a workgroup of {{ size }} per row of logits{{ ", drawn" if sampled else ": the one of the largest logit" }}; then the row of x that the token begins.
//
// Logits are compared as integers of the same order, NaN above all. Counts and probabilities that thresholds depend on are added up as
// integers, so that their order does not matter.
{# Inside: row < rows, col < used of logits, table and condition, token < vocabulary. Word token / 32 of a row of seen and of the mask of stop
   tokens exist, and the words of a row of state: 8, then {{ steps }} tokens and {{ steps }} logarithms. lid + k * (size / fold) < size. #}
{% set fold = 16 if size >= 256 else 8 %}
{% set groups = size // fold %}
{% include "shared/group" %}
{% if sampled %}
{% include "shared/pcg4d" %}
{% endif %}

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
{% if sampled %}

// The larger score, of equal ones the first.
fn best(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    return select(b, a, a.x > b.x || (a.x == b.x && a.y < b.y));
}

fn plus(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    return a + b;
}

fn plus_float(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    return vec4<u32>(bitcast<u32>(bitcast<f32>(a.x) + bitcast<f32>(b.x)), 0u, 0u, 0u);
}
{% endif %}
{# Over all invocations of the workgroup, in a fixed order. A second call may begin while others still read the first one's result: it writes
   `folded` after its first barrier. #}
{% macro over_all(function) %}

fn all_{{ function }}(value: vec4<u32>, lid: u32) -> vec4<u32> {
    scratch[lid] = value;
    workgroupBarrier();
    if (lid < {{ groups }}u) {
        var v = scratch[lid];
{% for k in range(1, fold) %}
        v = {{ function }}(v, scratch[lid + {{ k * groups }}u]);
{% endfor %}
        folded[lid] = v;
    }
    workgroupBarrier();
    var v = folded[0];
    for (var k = 1u; k < {{ groups }}u; k++) {
        v = {{ function }}(v, folded[k]);
    }
    return v;
}
{% endmacro %}
{{ over_all("join") }}
{% if sampled %}
{{ over_all("best") }}
{{ over_all("plus") }}
{{ over_all("plus_float") }}
{% endif %}

// Padding is -infinity.
fn logits_of(row: u32, col: u32) -> vec4<f32> {
{% if cols % 4 == 0 %}
    return logits_load(row * logits_stride + col);
{% else %}
    let valid = vec4<u32>(0u, 1u, 2u, 3u) + 4u * col < vec4<u32>({{ cols }}u);
    return select(vec4<f32>(bitcast<f32>(0xff800000u)), logits_load(row * logits_stride + col), valid);
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
{# Runs the statements of the caller for every `vec4` of the row that is this invocation's, which are in registers or read again. #}
{% macro every(read) %}
{% if held > 0 %}
{% for h in range(held) %}
    {
        let col = lid + {{ h * size }}u;
{% if read %}
        let s = s{{ h }};
{{ caller() }}
{% elif (h + 1) * size > used %}
        if (col < {{ used }}u) {
            let x = logits_of(row, col);
            let y = scores_of(x, row, col);
{{ caller() }}
{% if sampled %}
            s{{ h }} = keys_of(y);
{% endif %}
        }
{% else %}
        let x = logits_of(row, col);
        let y = scores_of(x, row, col);
{{ caller() }}
{% if sampled %}
        s{{ h }} = keys_of(y);
{% endif %}
{% endif %}
    }
{% endfor %}
{% else %}
    for (var col = lid; col < {{ used }}u; col += {{ size }}u) {
        let x = logits_of(row, col);
        let y = scores_of(x, row, col);
{% if read %}
        let key = scaled(keys_of(y), top, inverse);
        let s = select(vec4<u32>(), key, key >= vec4<u32>(least));
{% endif %}
{{ caller() }}
    }
{% endif %}
{% endmacro %}
{% if sampled %}

fn values_of(s: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(value_of(s.x), value_of(s.y), value_of(s.z), value_of(s.w));
}

// Keys of (score - top) / temperature, which is 0 at most.
fn scaled(s: vec4<u32>, top: f32, inverse: f32) -> vec4<u32> {
    return keys_of((values_of(s) - top) * inverse);
}

fn sum_of(v: vec4<u32>) -> u32 {
    return (v.x + v.y) + (v.z + v.w);
}

// Of keys in [t, upper): how many there are, and their weights at or above t + step, t + 2 step and t + 3 step.
fn counted(s: vec4<u32>, weight: vec4<u32>, t: u32, step: u32, upper: u32) -> vec4<u32> {
    let inside = (s >= vec4<u32>(t)) & (s < vec4<u32>(upper));
    let w = select(vec4<u32>(), weight, inside);
    let above1 = sum_of(select(vec4<u32>(), w, s >= vec4<u32>(t + step)));
    let above2 = sum_of(select(vec4<u32>(), w, s >= vec4<u32>(t + 2u * step)));
    let above3 = sum_of(select(vec4<u32>(), w, s >= vec4<u32>(t + 3u * step)));
    return vec4<u32>(above1, above2, above3, sum_of(select(vec4<u32>(), vec4<u32>(1u), inside)));
}

// -log of an exponential number. Near 1 a logarithm has no digits left, and the series has.
fn noise(bits: u32) -> f32 {
    let rest = (f32(bits >> 9u) + 0.5) * {{ 2.0 ** -23 }};
    let series = rest * (1.0 + rest * (0.5 + rest * (1.0 / 3.0)));
    return -log(select(-log(1.0 - rest), series, rest < 0.01));
}

// With the scores of four tokens and their noise.
fn drawn(choice: vec4<u32>, s: vec4<u32>, least: u32, bits: vec4<u32>, col: u32) -> vec4<u32> {
    let u = values_of(s) + vec4<f32>(noise(bits.x), noise(bits.y), noise(bits.z), noise(bits.w));
    let first = first_of(select(vec4<u32>(), keys_of(u), s >= vec4<u32>(least)));
    return best(choice, vec4<u32>(first.x, 4u * col + first.y, 0u, 0u));
}
{% endif %}
{# The largest key t such that tokens at or above it weigh at least `goal`, two bits of t at a time. What is at or above `upper` weighs
   `above`. Ends early where the choice is made. #}
{% macro search(goal, weight) %}
        var t = 0u;
        var upper = 0xffffffffu;
        var above = 0u;
        for (var shift = 32u; shift > 0u;) {
            shift -= 2u;
            let step = 1u << shift;
            var sums = vec4<u32>();
{% call every(true) %}
{% if weight == "mass" %}
        var weight = vec4<u32>();
        if (any((s >= vec4<u32>(t + step)) & (s < vec4<u32>(upper)))) {
            weight = vec4<u32>(exp(values_of(s)) * unit);
        }
{% else %}
        let weight = vec4<u32>(1u);
{% endif %}
        sums += counted(s, weight, t, step, upper);
{% endcall %}
            sums = all_plus(sums, lid);
            // Nothing is left to choose between.
            if (sums.w <= 1u{% if weight == "one" %} || above + sums.w == {{ goal }}{% endif %}) {
                break;
            }
            if (above + sums.z >= {{ goal }}) {
                t += 3u * step;
            } else if (above + sums.y >= {{ goal }}) {
                upper = t + 3u * step;
                t += 2u * step;
                above += sums.z;
            } else if (above + sums.x >= {{ goal }}) {
                upper = t + 2u * step;
                t += step;
                above += sums.y;
            } else {
                upper = t + step;
                above += sums.x;
            }
        }
        least = max(t, least);
{% endmacro %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = group_id(wid);
    if (row >= {{ rows }}u) {
        return;
    }
{% if sampled %}
{% for h in range(held) %}
    // -infinity, where the row has no columns left.
    var s{{ h }} = vec4<u32>(0x007fffffu);
{% endfor %}
{% endif %}
    var largest = LOWEST;
    var sum = 0.0;
    var invalid = false;
    var top_key = 0u;
    var index = 0u;
{% call every(false) %}
        invalid = invalid || any((bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u));
        let more = max(largest, max(max(x.x, x.y), max(x.z, x.w)));
        let e = exp(x - more);
        sum = sum * exp(largest - more) + ((e.x + e.y) + (e.z + e.w));
        largest = more;
        let first = first_of(keys_of(y));
        if (first.x > top_key) {
            top_key = first.x;
            index = 4u * col + first.y;
        }
{% endcall %}
    let part = vec4<u32>(select(key_of(largest), NAN_KEY, invalid), bitcast<u32>(sum), top_key, index);
    let whole = all_join(part, lid);
    let total = bitcast<f32>(whole.y);
    // NaN, +infinity, or nothing but -infinity.
    let bad = whole.x >= INFINITY_KEY || !(total >= 0.5);
    var token = whole.w;
{% if sampled %}
    let top = value_of(whole.z);
    let inverse = bitcast<f32>(options[0]);
    // Keys below this are out.
    var least = 1u;
{% for h in range(held) %}
    s{{ h }} = scaled(s{{ h }}, top, inverse);
{% endfor %}
    let top_k = options[2];
    if (top_k < {{ cols }}u) {
{{ search("top_k", "one") }}
{% for h in range(held) %}
        s{{ h }} = select(vec4<u32>(), s{{ h }}, s{{ h }} >= vec4<u32>(least));
{% endfor %}
    }
    let top_p = options[3];
    if (top_p < 0x80000000u) {
        var mass = 0.0;
{% call every(true) %}
        let e = select(vec4<f32>(), exp(values_of(s)), s >= vec4<u32>(least));
        mass += (e.x + e.y) + (e.z + e.w);
{% endcall %}
        // Probabilities in units of 2^-31.
        let unit = 2147483648.0 / bitcast<f32>(all_plus_float(vec4<u32>(bitcast<u32>(mass), 0u, 0u, 0u), lid).x);
{{ search("top_p", "mass") }}
    }
    let at = row * state_stride;
    let draw = vec3<u32>(state_at(at + 1u), state_at(at + 3u), state_at(at + 4u));
    var choice = vec4<u32>();
{% call every(true) %}
        if (any(s >= vec4<u32>(least))) {
            choice = drawn(choice, s, least, pcg4d(vec4<u32>(col, draw)), col);
        }
{% endcall %}
    token = all_best(choice, lid).y;
{% endif %}
    token = min(token, {{ cols - 1 }}u);
    for (var col = lid; col < x_stride; col += {{ size }}u) {
        var v = vec4<f32>();
        if (col < {{ width }}u) {
            v = table_load(token * table_stride + col) + condition_load(row * condition_stride + col);
        }
        x_store(row * x_stride + col, v);
    }
    if (lid == 0u) {
        let to = row * state_stride;
        let position = state_at(to + 1u);
        var written = options[4];
        var log_probability = 0.0;
        if (state_at(to + 2u) == 0u) {
            if (bad) {
                state_put(to + 2u, 2u);
            } else {
                written = token;
                // Relative to the maximum, so that large logits do not swallow it.
                log_probability = (logits_load(row * logits_stride + token / 4u)[token % 4u] - value_of(whole.x)) - log(total);
                let word = token / 32u;
                let bit = 1u << (token % 32u);
                seen_put(row * seen_stride + word, seen_at(row * seen_stride + word) | bit);
                if ((options[8u + word] & bit) != 0u) {
                    state_put(to + 2u, 1u);
                }
            }
        }
        state_put(to, written);
        state_put(to + 1u, position + 1u);
        state_put(to + 8u + position % {{ steps }}u, written);
        state_put(to + {{ 8 + steps }}u + position % {{ steps }}u, bitcast<u32>(log_probability));
    }
}
