// The next token of every text, a workgroup of {{ size }} per row of logits{{ ", drawn" if sampled else ": the one of the largest logit" }}; then the row of x that the token begins.
//
// Logits are compared as integers of the same order, NaN above all. Counts and probabilities that thresholds depend on are added up as
// integers, so that their order does not matter.
{# Inside: row < rows, col < used of logits, table and condition, token < vocabulary. Word token / 32 of a row of seen and of the mask of stop
   tokens exist, and the words of a row of state: 8, then {{ steps }} tokens and {{ steps }} logarithms. lid + k * (size / fold) < size.
   Parts, rounded up to a multiple of 8, are at most `size`; places among them and among n candidates are below parts and n; n <= size; 0 <
   top_k. Numbers in `order` are below parts, or parts, which ends it. #}
{% set fold = 16 if size >= 256 else 8 %}
{% set groups = size // fold %}
{% include "shared/group" %}
{% if sampled %}
{% include "shared/pcg4d" %}
{% endif %}

{% include "shared/scores" %}
{% if quick %}
var<workgroup> order: array<u32, {{ size }}>;
var<workgroup> found: array<vec2<u32>, {{ size }}>;
{% endif %}
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
{% if sampled %}
{% set function = "best" %}
{% include "shared/over_all" %}
{% set function = "plus" %}
{% include "shared/over_all" %}
{% set function = "plus_float" %}
{% include "shared/over_all" %}
{% endif %}

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
    if (!any(inside)) {
        return vec4<u32>();
    }
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

{% if quick %}
// Whether a token comes before another, by key, then by number.
fn before(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x > b.x || (a.x == b.x && a.y < b.y);
}

{% endif %}
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
        {
        var t = 0u;
        var upper = 0xffffffffu;
        var above = 0u;
        for (var shift = 32u; shift > 0u;) {
            shift -= 2u;
            let step = 1u << shift;
            var sums = vec4<u32>();
{% if weight == "largest" %}
            sums = counted(vec4<u32>(most, 0u, 0u, 0u), vec4<u32>(1u), t, step, upper);
{% else %}
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
{% endif %}
            sums = all_plus(sums, lid);
            // Nothing is left to choose between.
            if (sums.w <= 1u{% if weight != "mass" %} || above + sums.w == {{ goal }}{% endif %}) {
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
        }
{% endmacro %}

{# Runs the statements of the caller for every `vec4` of the parts in `order`, a few of them for an invocation. #}
{% macro every_ordered() %}
            for (var i = lid; i < {{ parts * span }}u; i += {{ size }}u) {
                let number = order[i / {{ span }}u];
                if (number == {{ parts }}u) {
                    break;
                }
                let col = number * {{ span }}u + i % {{ span }}u;
                if (col < {{ used }}u) {
                    let s = scaled(keys_of(scores_of(logits_of(row, col), row, col)), top, inverse);
{{ caller() }}
                }
            }
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
{% if parts > 0 %}
    var part = vec4<u32>(key_of(LOWEST), 0u, 0u, 0u);
    for (var i = lid; i < {{ parts }}u; i += {{ size }}u) {
        part = join(part, parts_load(row * parts_stride + i));
    }
    let whole = all_join(part, lid);
{% else %}
    var part = beginning();
{% call every(false) %}
        part = with_four(part, x, y, col);
{% endcall %}
    let whole = all_join(packed(part), lid);
{% endif %}
    let total = bitcast<f32>(whole.y);
    // NaN, +infinity, or nothing but -infinity.
    let bad = whole.x >= INFINITY_KEY || !(total >= 0.5);
    var token = whole.w;
{% if sampled %}
    let top = value_of(whole.z);
    let inverse = bitcast<f32>(options[0]);
    let top_k = options[2];
    let top_p = options[3];
    let at = row * state_stride;
    let draw = vec3<u32>(state_at(at + 1u), state_at(at + 3u), state_at(at + 4u));
    // Keys below this are out.
    var least = 1u;
    var choice = vec4<u32>();
{% if quick %}
    // As many parts as tokens are wanted, those of the largest scores, and what reaches the last of these scores: few tokens, which are
    // put in order, one for each invocation. Where they are too many, everything is searched.
    var few = false;
    if (top_k <= {{ parts }}u) {
        let own = key_of((value_of(part.z) - top) * inverse);
        order[lid] = select(0u, own, lid < {{ parts }}u);
        workgroupBarrier();
        var larger = 0u;
        var place = 0u;
        if (lid < {{ parts }}u) {
            for (var i = 0u; i < {{ parts }}u; i += 8u) {
{% for k in range(8) %}
                let other{{ k }} = order[i + {{ k }}u];
{% endfor %}
{% for k in range(8) %}
                larger += select(0u, 1u, other{{ k }} > own);
                place += select(0u, 1u, other{{ k }} > own || (other{{ k }} == own && i + {{ k }}u < lid));
{% endfor %}
            }
            found[place] = vec2<u32>(own, select({{ parts }}u, lid, larger < top_k));
        }
        workgroupBarrier();
        let bound = found[top_k - 1u].x;
        if (lid < {{ parts }}u) {
            order[lid] = found[lid].y;
        }
        workgroupBarrier();
        var count = 0u;
{% call every_ordered() %}
                    count += sum_of(select(vec4<u32>(), vec4<u32>(1u), s >= vec4<u32>(bound)));
{% endcall %}
        scratch[lid] = vec4<u32>(count, 0u, 0u, 0u);
        workgroupBarrier();
        let column = lid % {{ groups }}u;
        var to = 0u;
        if (lid < {{ groups }}u) {
            folded[lid] = {% for k in range(fold) %}{{ " + " if k }}scratch[lid + {{ k * groups }}u]{% endfor %};
        }
        let same = workgroupUniformLoad(&folded);
        var n = 0u;
{% for k in range(groups) %}
        n += same[{{ k }}].x;
        to += select(0u, same[{{ k }}].x, {{ k }}u < column);
{% endfor %}
{% for k in range(fold - 1) %}
        to += select(0u, scratch[column + {{ k * groups }}u].x, {{ (k + 1) * groups }}u <= lid);
{% endfor %}
        few = n >= top_k && n <= {{ size }}u;
        if (few) {
{% call every_ordered() %}
{% for e in range(4) %}
                    if (s[{{ e }}] >= bound) {
                        found[to] = vec2<u32>(s[{{ e }}], 4u * col + {{ e }}u);
                        to += 1u;
                    }
{% endfor %}
{% endcall %}
            workgroupBarrier();
            let given = found[min(lid, n - 1u)];
            if (lid < n) {
                place = 0u;
                for (var i = 0u; i < n; i++) {
                    place += select(0u, 1u, before(found[i], given));
                }
                scratch[place] = vec4<u32>(given, 0u, 0u);
            }
            if (lid == 0u) {
                order[0] = 1u;
            }
            workgroupBarrier();
            least = scratch[top_k - 1u].x;
            let token = scratch[min(lid, n - 1u)].xy;
            workgroupBarrier();
            let inside = lid < n && token.x >= least;
            let value = value_of(token.x);
            if (top_p < 0x80000000u) {
                let e = select(0.0, exp(value), inside);
                // Probabilities in units of 2^-31.
                let unit = 2147483648.0 / bitcast<f32>(all_plus_float(vec4<u32>(bitcast<u32>(e), 0u, 0u, 0u), lid).x);
                let weight = u32(e * unit);
                scratch[lid] = vec4<u32>(weight, 0u, 0u, 0u);
                workgroupBarrier();
                var above = 0u;
                if (inside) {
                    for (var i = 0u; i < lid; i++) {
                        above += scratch[i].x;
                    }
                }
                if (inside && above < top_p && above + weight >= top_p) {
                    order[0] = token.x;
                }
                workgroupBarrier();
                least = max(least, order[0]);
            }
            if (inside && token.x >= least) {
                let bits = pcg4d(vec4<u32>(token.y / 4u, draw));
                choice = vec4<u32>(key_of(value + noise(bits[token.y % 4u])), token.y, 0u, 0u);
            }
        }
    }
    if (!few) {
        workgroupBarrier();
{% if held > 0 %}
{% call every(false) %}
{% endcall %}
{% endif %}
{% endif %}
{% for h in range(held) %}
    s{{ h }} = scaled(s{{ h }}, top, inverse);
{% endfor %}
    if (top_k < {{ cols }}u) {
{% if held > 0 %}
        // As many tokens as invocations whose own largest is there: a bound that leaves little to search.
        var most = 0u;
{% for h in range(held) %}
        most = max(most, max(max(s{{ h }}.x, s{{ h }}.y), max(s{{ h }}.z, s{{ h }}.w)));
{% endfor %}
        if (top_k <= {{ size }}u) {
{{ search("top_k", "largest") }}
        }
{% for h in range(held) %}
        s{{ h }} = select(vec4<u32>(), s{{ h }}, s{{ h }} >= vec4<u32>(least));
{% endfor %}
{% endif %}
{{ search("top_k", "one") }}
{% for h in range(held) %}
        s{{ h }} = select(vec4<u32>(), s{{ h }}, s{{ h }} >= vec4<u32>(least));
{% endfor %}
    }
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
{% call every(true) %}
        if (any(s >= vec4<u32>(least))) {
            choice = drawn(choice, s, least, pcg4d(vec4<u32>(col, draw)), col);
        }
{% endcall %}
{% if quick %}
    }
{% endif %}
    token = all_best(choice, lid).y;
{% endif %}
    token = min(token, {{ cols - 1 }}u);
{% if sampled or parts == 0 %}
    // Others have read what is written below.
    storageBarrier();
{% endif %}
    // What depends on the token is asked for at once.
    let to = row * state_stride;
    let word = token / 32u;
    let bit = 1u << (token % 32u);
    var position = 0u;
    var doing = 0u;
    var logit = 0.0;
    var marks = 0u;
    var stops = 0u;
    if (lid == 0u) {
        position = state_at(to + 1u);
        doing = state_at(to + 2u);
        logit = logits_load(row * logits_stride + token / 4u)[token % 4u];
        marks = seen_at(row * seen_stride + word);
        stops = options[8u + word];
    }
    for (var col = lid; col < x_stride; col += {{ size }}u) {
        var v = vec4<f32>();
        if (col < {{ width }}u) {
            v = table_load(token * table_stride + col) + condition_load(row * condition_stride + col);
        }
        x_store(row * x_stride + col, v);
    }
    if (lid == 0u) {
        var written = options[4];
        var log_probability = 0.0;
        if (doing == 0u) {
            if (bad) {
                state_put(to + 2u, 2u);
            } else {
                written = token;
                // Relative to the maximum, so that large logits do not swallow it.
                log_probability = (logit - value_of(whole.x)) - log(total);
                seen_put(row * seen_stride + word, marks | bit);
                if ((stops & bit) != 0u) {
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
